"""An adapter's files: which content they are, and whether vLLM can use them.

Owns the layout that PEFT writes (adapter_config.json beside adapter_model.safetensors)
and what vLLM's loader makes of it. Knows no server, no public name and no event loop:
everything here blocks, so callers run it in a thread. Weights are read as bytes, in
blocks, and never unpickled.

A path is the adapter's location *as vLLM sees it*. Where it leads to nothing on this
machine, or to something that this process may not read, nothing is concluded from that:
vLLM is the judge then.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lora_proxy.errors import ProxyError, rank_too_high

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
WEIGHTS = (SAFETENSORS, "adapter_model.bin", "adapter_model.pt")
"""File names in the order in which vLLM looks for them; the first one found is used."""

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, size, mtime_ns and inode of every file that makes up the adapter."""

_BLOCK = 1 << 20
_MAX_CONFIG = 10_000_000
_MAX_HEADER = 100_000_000  # the safetensors library refuses larger ones
_MAX_HEADER_KEYS = 2_000_000  # four to a tensor; what bounds our memory for the parsed header

_MERGE = "train without it, or merge the adapter into the base model and serve that"
_COPY_AGAIN = "copy or download the file again (a Git LFS pointer needs `git lfs pull`)"


# --- which content it is -----------------------------------------------------------


def fingerprint(path: str) -> Fingerprint | None:
    """What changes when the adapter's files do, from `stat` alone.

    Returns:
        None where the files cannot be read from here, or are not an adapter.
    """
    local = _local(path)
    if local is None:
        return None
    try:
        files = _files(local)
    except OSError:
        return None
    # Files that only show are not watched: their content has no part in the revision.
    if files is None or not all(_may_read(local / name) for name in files):
        return None
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in files.items())


def revision(path: str, declared: str | None) -> str:
    """The 8 hex digits that stand for this content in a served name.

    Args:
        path: The adapter's location as vLLM sees it.
        declared: The operator's word for the content; it counts, together with the path,
            only where the files cannot be read from here.
    """
    digest = _content_digest(path)
    if digest is None:
        # json: unambiguous for any two texts, also for those that UTF-8 cannot encode
        digest = hashlib.sha256(json.dumps([path, declared]).encode()).digest()
    return digest[:4].hex()


def _content_digest(path: str) -> bytes | None:
    local = _local(path)
    if local is None:
        return None
    whole = hashlib.sha256()
    try:
        files = _files(local)
        if files is None:
            return None
        for name in files:
            with _open(local / name) as file:
                size = os.fstat(file.fileno()).st_size
                # Name, size and a digest of fixed length: no two layouts frame alike.
                content = hashlib.file_digest(file, "sha256").digest()
            whole.update(f"{name}\0{size}\0".encode() + content)
    except OSError:
        return None
    return whole.digest()


# --- whether vLLM can use it -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in an adapter that has no known fault.

    Attributes:
        readable: False where the files cannot be read from here; nothing is known then.
        rank: The largest rank of any module, which `--max-lora-rank` must reach.
        base_model: What the adapter says it was trained on; a path or a Hugging Face id.
    """

    readable: bool
    rank: int | None = None
    base_model: str | None = None


_Rank = Annotated[int, msgspec.Meta(gt=0)]


class _Config(msgspec.Struct, kw_only=True):
    """The keys of adapter_config.json that decide; required are those that vLLM requires.

    `Any` where vLLM asks only whether a value is truthy.
    """

    r: _Rank
    lora_alpha: float
    target_modules: Any
    rank_pattern: dict[str, _Rank] | None = None
    base_model_name_or_path: str | None = None
    peft_type: str | None = None
    bias: Any = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: Any = True
    use_dora: Any = False
    lora_bias: Any = False
    use_qalora: Any = False
    use_bdlora: Any = None
    alora_invocation_tokens: Any = None
    layer_replication: Any = None
    trainable_token_indices: Any = None


# vllm/lora/peft_helper.py refuses the first six by name, and the tensors of the last.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA biases",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trained token embeddings",
}
_WHOLE_MODULES = frozenset({"classifier", "score"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")


class _Tensor(msgspec.Struct):
    dtype: str
    data_offsets: tuple[int, int]


_decode_config = msgspec.json.Decoder(_Config).decode
_decode_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_tensor = msgspec.json.Decoder(_Tensor).decode


def inspect(path: str, max_rank: int | None = None) -> Inspection:
    """Look for what vLLM would refuse, or would load without any effect.

    Args:
        path: The adapter's location as vLLM sees it.
        max_rank: The server's `--max-lora-rank`, where it is known.

    Raises:
        ProxyError: `adapter_not_found`, `adapter_invalid`, `adapter_rank_too_high` or
            `adapter_untrained`. The message does not name the adapter, which only the
            caller knows.
    """
    local = _local(path)
    if local is None:
        return Inspection(readable=False)
    try:
        return _inspect(local, max_rank)
    except OSError:
        return Inspection(readable=False)


def _inspect(folder: Path, max_rank: int | None) -> Inspection:
    if not folder.is_dir():
        raise _invalid("path is a file", f"point `path` at the folder that holds {CONFIG}")
    if _regular(folder / CONFIG) is None:
        raise ProxyError(
            "adapter_not_found",
            f"the adapter's folder holds no {CONFIG}; point `path` at the folder that does "
            "(in LLaMA-Factory: output_dir, or one of its checkpoint-N folders)",
        )
    config = _read_config(folder / CONFIG)
    _check_config(config)
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if max_rank is not None and rank > max_rank:
        raise rank_too_high(rank, max_rank)

    weights = _weights(folder)
    if weights is None:
        raise _invalid(f"folder holds no {SAFETENSORS}", "save the adapter's weights beside it")
    if weights == SAFETENSORS:
        with _open(folder / weights) as file:
            _check_weights(file, config.modules_to_save or ())
    return Inspection(readable=True, rank=rank, base_model=config.base_model_name_or_path)


def _read_config(path: Path) -> _Config:
    with _open(path) as file:
        raw = file.read(_MAX_CONFIG + 1)
    if len(raw) > _MAX_CONFIG:
        raise _invalid(f"{CONFIG} is larger than {_MAX_CONFIG} bytes", "save it again with PEFT")
    try:
        return _decode_config(raw)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{CONFIG} cannot be used: {error}", "save it again with PEFT") from None


def _check_config(config: _Config) -> None:
    # vLLM never reads peft_type: a config without one loads.
    if config.peft_type not in (None, "LORA"):
        raise _invalid(f"{CONFIG} has a peft_type other than LORA", "train a LoRA adapter")
    for key, feature in _UNSUPPORTED.items():
        if getattr(config, key):
            raise _invalid(f"{CONFIG} sets {key}, and vLLM has no {feature}", _MERGE)
    if not _WHOLE_MODULES.issuperset(config.modules_to_save or ()):
        raise _invalid(
            f"{CONFIG} sets modules_to_save, which vLLM takes for classifier and score only",
            _MERGE + " (in LLaMA-Factory: additional_target and resize_vocab set it)",
        )
    if config.bias != "none":
        raise _invalid(f'{CONFIG} has a bias other than "none"', _MERGE)
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise _invalid(
            f"{CONFIG} has an init_lora_weights that changes the base model's weights",
            "convert it to a plain LoRA (LLaMA-Factory with pissa_convert writes one to "
            "pissa_converted/) and point `path` there",
        )


def _check_weights(file: BufferedReader, whole_modules: Container[str]) -> None:
    tensors, start = _read_header(file)
    _check_layout(tensors, os.fstat(file.fileno()).st_size - start)
    starts_zero, has_whole_modules = _check_names(tensors, whole_modules)
    if has_whole_modules:
        return  # a trained head has its effect whatever the factors are
    if all(_all_zero(file, start, tensors[name]) for name in starts_zero):
        raise ProxyError(
            "adapter_untrained",
            f"every lora_B in the adapter's {SAFETENSORS} is zero, so it would change nothing; "
            "train it, or point `path` at a checkpoint that is trained",
        )


def _read_header(file: BufferedReader) -> tuple[dict[str, _Tensor], int]:
    """Read a safetensors header: eight bytes of length, then one JSON object.

    Returns:
        The tensors by name, and the offset in the file that their offsets count from.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise _invalid(f"{SAFETENSORS} is not a safetensors file", _COPY_AGAIN)
    if 8 + length > os.fstat(file.fileno()).st_size:
        raise _invalid(f"{SAFETENSORS} ends inside its header", _COPY_AGAIN)
    raw = file.read(length)
    if raw.count(b":") > _MAX_HEADER_KEYS:
        raise _invalid(f"{SAFETENSORS} lists too many tensors", _COPY_AGAIN)
    try:
        entries = _decode_header(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _decode_tensor(entry) for name, entry in entries.items()}
    except (ValueError, RecursionError):
        raise _invalid(f"{SAFETENSORS} has a header that is not valid", _COPY_AGAIN) from None
    return tensors, 8 + length


def _check_layout(tensors: Mapping[str, _Tensor], available: int) -> None:
    reached = 0
    for begin, end in sorted(tensor.data_offsets for tensor in tensors.values()):
        # Also what bounds our own reading: no byte belongs to two tensors.
        if begin < reached or end < begin:
            raise _invalid(f"{SAFETENSORS} has tensors that overlap", _COPY_AGAIN)
        if end > available:
            raise _invalid(f"{SAFETENSORS} ends before its last tensor", _COPY_AGAIN)
        reached = end


# The names that vllm/lora/utils.py parses as factors, and those that it skips.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))", re.DOTALL
)
_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def _check_names(
    tensors: Mapping[str, _Tensor], whole_modules: Container[str]
) -> tuple[list[str], bool]:
    """Check that the tensors are pairs of factors and nothing that vLLM refuses.

    Returns:
        The factors that PEFT starts at zero (lora_B, and A of an embedding), and whether
        there are whole modules besides the factors.
    """
    halves: dict[str, set[str]] = defaultdict(set)
    starts_zero: list[str] = []
    has_whole_modules = False
    for name in tensors:
        if factor := _FACTOR.fullmatch(name):
            halves[factor["module"]].add(factor["linear"] or factor["embedding"])
            if factor["linear"] == "B" or factor["embedding"] == "A":
                starts_zero.append(name)
        elif _is_whole_module(name, whole_modules):
            has_whole_modules = True
        elif not name.endswith(_SKIPPED):
            raise _invalid(
                f"{SAFETENSORS} holds {_printable(name)}, which is no LoRA factor",
                "train without whole modules, added tokens and DoRA, or merge the adapter "
                "into the base model and serve that",
            )
    if not halves:
        raise _invalid(f"{SAFETENSORS} holds no lora_A and lora_B", "save it again with PEFT")
    for module, found in halves.items():
        if len(found) == 1:
            raise _invalid(
                f"{SAFETENSORS} holds only lora_{found.pop()} of {_printable(module)}",
                "save it again with PEFT",
            )
    return starts_zero, has_whole_modules


def _is_whole_module(name: str, whole_modules: Container[str]) -> bool:
    *_, module, kind = ("", *name.split("."))
    return kind in ("weight", "bias") and module in whole_modules


_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes per number of the formats in which the sign bit alone means minus zero."""


def _all_zero(file: BufferedReader, start: int, tensor: _Tensor) -> bool:
    """Whether a tensor is zero throughout; returns at the first block that is not."""
    begin, end = tensor.data_offsets
    width = _WIDTHS.get(tensor.dtype)
    file.seek(start + begin)
    left = end - begin
    while left:
        block = file.read(min(left, _BLOCK))
        if not block or not _is_zero(block, width):
            return False
        left -= len(block)
    return True


def _is_zero(block: bytes, width: int | None) -> bool:
    if width is None:
        return block.count(0) == len(block)
    # Little-endian: the sign bit is the highest of each number's last byte.
    signs = block[width - 1 :: width].count(0x80)
    return block.count(0) + signs == len(block)


# --- the file system ---------------------------------------------------------------


def _local(path: str) -> Path | None:
    """The path on this machine, as vLLM would resolve it, or None where nothing is there."""
    if "://" in path:
        return None
    try:
        local = Path(path).expanduser()
        local.stat()
    except (OSError, ValueError, RuntimeError):
        return None  # ValueError: no path can hold such text; RuntimeError: ~ of nobody
    return local


def _files(folder: Path) -> dict[str, os.stat_result] | None:
    """The files that make up the adapter, or None where one is missing."""
    weights = _weights(folder)
    config = _regular(folder / CONFIG)
    if weights is None or config is None:
        return None
    status = _regular(folder / weights)
    return None if status is None else {CONFIG: config, weights: status}


def _weights(folder: Path) -> str | None:
    found = (name for name in WEIGHTS if _regular(folder / name) is not None)
    return next(found, None)


def _regular(path: Path) -> os.stat_result | None:
    """The status of a regular file; None where vLLM too would find none."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) else None


def _open(path: Path) -> BufferedReader:
    """Open a regular file, and only that: a FIFO put in its place must not block us."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _may_read(path: Path) -> bool:
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def _printable(name: str) -> str:
    """The end of a tensor's name, fit for one line of any message."""
    return ascii(name[-80:])


def _invalid(fault: str, step: str) -> ProxyError:
    return ProxyError("adapter_invalid", f"the adapter's {fault}; {step}")
