"""What the tests of deploy/ share: where things lie, and when a proxy fits a vLLM."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_proxy.settings import Listen, Settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
KUBERNETES = DEPLOY / "kubernetes"
LAYOUTS = ("sidecar", "fleet")

PORT = Listen().port
VLLM_PORT = 8000


def run(*command: str | Path) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, each on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (one.partition(" ") for one in joined.splitlines())]


def last(instruction: str) -> str:
    """What the last such instruction, the one that counts, says."""
    return [rest for name, rest in instructions() if name == instruction][-1]


def options(flags: Sequence[str]) -> dict[str, str]:
    """Flags of vLLM, all written --name or --name=value."""
    assert all(flag.startswith("--") for flag in flags)
    return {name: value for name, _, value in (flag[2:].partition("=") for flag in flags)}


def assert_fits(flags: Sequence[str], environ: Mapping[str, str], settings: Settings) -> None:
    """A vLLM that is started so does what the proxy's settings expect of each upstream."""
    said = options(flags)
    assert "enable-lora" in said
    assert environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert said["api-server-count"] == "1"
    assert said.get("port", str(VLLM_PORT)) == str(VLLM_PORT)
    assert int(said["max-loras"]) <= int(said["max-cpu-loras"])
    for upstream in settings.upstreams:
        assert said["max-cpu-loras"] == str(upstream.max_cpu_loras)
        assert said["max-lora-rank"] == str(upstream.max_lora_rank)
        assert said["served-model-name"] == upstream.base_model
