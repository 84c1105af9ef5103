"""A reverse proxy that puts LoRA adapter routing in front of native vLLM servers."""

__version__ = "0.1.0"
