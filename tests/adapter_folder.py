"""An adapter's folder that the proxy can read, written again and again with other weights.

Owns the files; refuses to know who reads them. The weights are one number a matrix, which is
all that inspection and a served name's digest need.
"""

import json
import struct
from pathlib import Path

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
GIVEN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def write(folder: Path, weight: float = 1.0, **config: object) -> str:
    """Writes both files; the weights come into their place whole, as a careful trainer's do.

    Args:
        folder: Made if need be.
        weight: Another one is another content.
        config: Fields of adapter_config.json; a `base_model_name_or_path`, for one.

    Returns:
        The folder as an adapter's `path`.
    """
    folder.mkdir(exist_ok=True)
    header = {
        f"{STEM}.lora_{factor}.weight": {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [4 * number, 4 * number + 4],
        }
        for number, factor in enumerate("AB")
    }
    raw = json.dumps(header).encode()
    (folder / "adapter_config.json").write_text(json.dumps(GIVEN | config))
    fresh = folder / "fresh"
    fresh.write_bytes(struct.pack("<Q", len(raw)) + raw + struct.pack("<ff", 1.0, weight))
    fresh.replace(folder / "adapter_model.safetensors")
    return str(folder)
