"""Adapter folders made by hand: what is read from them, and which faults are named."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_proxy import sources
from lora_proxy.errors import ProxyError
from lora_proxy.sources import Inspection

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/tiny",
    "bias": "none",
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "init_lora_weights": True,
    "use_dora": False,
    "rank_pattern": {},
}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"
TRAINED = struct.pack("<4f", 0.0, 0.0, 0.5, 0.0)
ZERO = bytes(16)

Tensors = dict[str, tuple[str, bytes]]
Make = Callable[..., str]


def safetensors(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file with one-dimensional tensors, given as dtype and bytes."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    data = b""
    for name, (dtype, raw) in tensors.items():
        begin = len(data)
        data += raw
        header[name] = {
            "dtype": dtype,
            "shape": [len(raw)],
            "data_offsets": [begin, len(data)],
        }
    raw_header = json.dumps(header).encode()
    return struct.pack("<Q", len(raw_header)) + raw_header + data


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


PAIR: Tensors = {A: ("F32", TRAINED), B: ("F32", TRAINED)}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes an adapter folder; `config` are changes, or the file's bytes."""

    def make(
        config: dict[str, Any] | bytes | None = None,
        weights: Tensors | bytes | None = None,
        name: str = "adapter_model.safetensors",
    ) -> str:
        folder = tmp_path / "sql"
        folder.mkdir(exist_ok=True)
        if not isinstance(config, bytes):
            config = json.dumps(CONFIG | (config or {})).encode()
        if not isinstance(weights, bytes):
            weights = safetensors(PAIR if weights is None else weights)
        (folder / "adapter_config.json").write_bytes(config)
        (folder / name).write_bytes(weights)
        return str(folder)

    return make


def fault(path: str, max_rank: int | None = None) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        sources.inspect(path, max_rank)
    message = caught.value.message
    assert message.isprintable()
    assert len(message) < 500
    assert "; " in message, "no next step"
    return caught.value


# --- sound adapters ----------------------------------------------------------------


def test_a_sound_adapter(make: Make) -> None:
    assert sources.inspect(make(), 8) == Inspection(readable=True, rank=8, base_model="org/tiny")


def test_rank_is_the_largest_of_all_modules(make: Make) -> None:
    assert sources.inspect(make({"rank_pattern": {"v_proj": 32, "k_proj": 4}})).rank == 32


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": False},
        {"layer_replication": None, "alora_invocation_tokens": [], "lora_bias": None},
        {"target_modules": "all-linear", "rank_pattern": None},
        {"peft_type": None},
        {"something_new": {"nested": [1, 2.5, None]}},
    ],
)
def test_what_vllm_takes_is_taken(make: Make, config: dict[str, Any]) -> None:
    assert sources.inspect(make(config)).readable


def test_a_classification_head_is_taken_and_counts_as_an_effect(make: Make) -> None:
    head: Tensors = {"base_model.model.score.weight": ("F32", TRAINED)}
    untrained: Tensors = {A: ("F32", TRAINED), B: ("F32", ZERO)}
    assert sources.inspect(make({"modules_to_save": ["score"]}, untrained | head)).readable


def test_embedding_factors_and_the_base_weights_that_vllm_skips_are_taken(make: Make) -> None:
    stem = "base_model.model.model.embed_tokens"
    tensors: Tensors = {
        f"{stem}.lora_embedding_A": ("F32", TRAINED),
        f"{stem}.lora_embedding_B": ("F32", TRAINED),
        f"{stem}.base_layer.weight": ("F32", TRAINED),
    }
    assert sources.inspect(make(weights=tensors)).readable


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_never_opened(make: Make, name: str) -> None:
    assert sources.inspect(make(weights=b"cos\nsystem\n(S'false'\ntR.", name=name)).rank == 8


@pytest.mark.parametrize(
    "path",
    [
        "/no/such/place",
        "hf://org/repo",
        "s3://bucket/prefix",
        "org/repo",
        "a\0b",
        "~nobody-here/x",
        "\ud800",
    ],
)
def test_a_path_that_is_not_here_says_nothing(path: str) -> None:
    assert sources.inspect(path) == Inspection(readable=False)
    assert sources.fingerprint(path) is None


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so the tests' root steps down for a moment."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", ["adapter_config.json", "adapter_model.safetensors", "."])
def test_files_that_may_not_be_read_here_are_left_to_vllm(make: Make, closed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        path = shutil.copytree(make(), f"{folder}/sql")
        Path(folder).chmod(0o755)
        Path(path, closed).chmod(0)
        with as_nobody():
            assert sources.inspect(path) == Inspection(readable=False)
            assert sources.fingerprint(path) is None
            assert sources.revision(path, "1") != sources.revision(path, "2")
        Path(path, closed).chmod(0o755)


def test_a_loop_of_links_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert sources.inspect(str(tmp_path / "loop")) == Inspection(readable=False)


# --- faults of the folder and the config -------------------------------------------


def test_no_config(make: Make) -> None:
    path = make()
    Path(path, "adapter_config.json").unlink()
    error = fault(path)
    assert error.code == "adapter_not_found"
    assert "adapter_config.json" in error.message
    assert sources.fingerprint(path) is None


def test_no_weights(make: Make) -> None:
    path = make()
    Path(path, "adapter_model.safetensors").unlink()
    error = fault(path)
    assert error.code == "adapter_invalid"
    assert "adapter_model.safetensors" in error.message


def test_a_file_instead_of_a_folder(make: Make) -> None:
    assert fault(make() + "/adapter_config.json").code == "adapter_invalid"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device"])
def test_what_is_no_regular_file_counts_as_missing(make: Make, name: str, kind: str) -> None:
    path = make()
    file = Path(path, name)
    file.unlink()
    {
        "fifo": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "loop": lambda: file.symlink_to(name),
        "device": lambda: file.symlink_to("/dev/zero"),
    }[kind]()
    assert fault(path).code in ("adapter_not_found", "adapter_invalid")
    assert sources.fingerprint(path) is None
    assert sources.revision(path, "1") == sources.revision(path, "1")


def test_a_fifo_that_takes_a_files_place_after_the_look_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        sources._open(tmp_path / "fifo")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"r":' + b"[" * 200_000,
        json.dumps({k: v for k, v in CONFIG.items() if k != "r"}).encode(),
        json.dumps({k: v for k, v in CONFIG.items() if k != "lora_alpha"}).encode(),
        json.dumps({k: v for k, v in CONFIG.items() if k != "target_modules"}).encode(),
    ],
)
def test_a_config_that_is_not_one(make: Make, raw: bytes) -> None:
    error = fault(make(raw))
    assert error.code == "adapter_invalid"
    assert "adapter_config.json" in error.message


def test_a_huge_config_is_not_parsed(make: Make) -> None:
    error = fault(make(json.dumps(CONFIG).encode() + b" " * 10_000_000))
    assert "larger than" in error.message


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"r": 0}, "$.r"),
        ({"r": -8}, "$.r"),
        ({"r": "8"}, "$.r"),
        ({"r": True}, "$.r"),
        ({"r": None}, "$.r"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": [8]}, "rank_pattern"),
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["score", "lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa_converted/"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_converted/"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices"),
    ],
)
def test_a_config_that_vllm_refuses(make: Make, config: dict[str, Any], named: str) -> None:
    error = fault(make(config))
    assert error.code == "adapter_invalid"
    assert "adapter_config.json" in error.message
    assert named in error.message


@pytest.mark.parametrize(
    ("rank", "step"),
    [
        (17, "--max-lora-rank 32"),
        (64, "--max-lora-rank 64"),
        (257, "--max-lora-rank 320"),
        (512, "--max-lora-rank 512"),
        (513, "lower rank"),
    ],
)
def test_rank_above_the_servers(make: Make, rank: int, step: str) -> None:
    path = make({"rank_pattern": {"v_proj": rank}})
    error = fault(path, 16)
    assert error.code == "adapter_rank_too_high"
    assert f"rank {rank}" in error.message
    assert "--max-lora-rank 16;" in error.message
    assert error.message.endswith(step)
    assert sources.inspect(path).rank == rank


# --- faults of the weights ---------------------------------------------------------


def test_every_truncation_is_noticed(make: Make) -> None:
    whole = safetensors(PAIR)
    for length in range(len(whole)):
        error = fault(make(weights=whole[:length]))
        assert error.code == "adapter_invalid", length
        assert "adapter_model.safetensors" in error.message


@pytest.mark.parametrize(
    "raw",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 3) + b"[1]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 4) + b'{"a"',
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000,
        with_header({A: 1}),
        with_header({A: {"dtype": "F32", "shape": [4]}}),
        with_header({A: {"dtype": "F32", "shape": [4], "data_offsets": [0]}}),
        with_header({A: {"dtype": "F32", "shape": [4], "data_offsets": [0, "16"]}}),
        with_header({A: {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**40]}}, ZERO),
        with_header({A: {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, ZERO),
        with_header({A: {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, ZERO),
        with_header({A: {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}}, ZERO),
    ],
)
def test_a_file_that_is_not_safetensors(make: Make, raw: bytes) -> None:
    error = fault(make(weights=raw))
    assert error.code == "adapter_invalid"
    assert "copy or download" in error.message


def test_tensors_that_share_bytes_are_refused(make: Make) -> None:
    """Else a small file could name its bytes a million times, and have us read them as often."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    assert "overlap" in fault(make(weights=with_header({A: entry, B: entry}, ZERO))).message


def test_a_header_of_nothing_but_keys_is_not_parsed(make: Make) -> None:
    raw = b"{" + b",".join([b'"":0'] * 2_000_001) + b"}"
    assert "too many" in fault(make(weights=struct.pack("<Q", len(raw)) + raw)).message


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({}, "holds no lora_A"),
        ({A: ("F32", TRAINED)}, "only lora_A of"),
        ({B: ("F32", TRAINED)}, "only lora_B of"),
        (PAIR | {"base_model.model.lm_head.weight": ("F32", TRAINED)}, "lm_head.weight"),
        (PAIR | {"base_model.model.score.weight": ("F32", TRAINED)}, "score.weight"),
        (PAIR | {f"{STEM}.lora_magnitude_vector": ("F32", TRAINED)}, "magnitude"),
        (
            PAIR | {"base_model.model.model.embed_tokens.trainable_tokens_delta": ("F32", ZERO)},
            "trainable_tokens_delta",
        ),
        ({f"{STEM}.lora_A.default.weight": ("F32", TRAINED)}, "lora_A.default.weight"),
        ({"lora_A.weight": ("F32", TRAINED)}, "no LoRA factor"),
        (PAIR | {"evil\n\x1b[31m" + "x" * 5000: ("F32", TRAINED)}, "xxx"),
        (PAIR | {"": ("F32", TRAINED)}, "''"),
    ],
)
def test_tensors_that_vllm_refuses(make: Make, tensors: Tensors, named: str) -> None:
    error = fault(make(weights=tensors))
    assert error.code == "adapter_invalid"
    assert named in error.message


MINUS_ZERO = {
    "F64": struct.pack("<d", -0.0),
    "F32": struct.pack("<f", -0.0),
    "F16": struct.pack("<e", -0.0),
    "BF16": b"\x00\x80",
    "F8_E4M3": b"\x80",
    "F8_E5M2": b"\x80",
}


@pytest.mark.parametrize("dtype", MINUS_ZERO)
def test_an_adapter_that_changes_nothing(make: Make, dtype: str) -> None:
    minus = MINUS_ZERO[dtype]
    width = len(minus)
    zeros: Tensors = {
        A: ("F32", TRAINED),
        B: (dtype, bytes(width) * 3 + minus * 5),
        A.replace("q_", "v_"): ("F32", TRAINED),
        B.replace("q_", "v_"): (dtype, b""),
    }
    assert fault(make(weights=zeros)).code == "adapter_untrained"
    for at in range(width):  # a lone bit anywhere but in the sign is a number
        for bit in (0x01, 0x80):
            raw = bytearray(width * 4)
            raw[width + at] = bit
            path = make(weights=zeros | {B: (dtype, bytes(raw))})
            if bit == 0x80 and at == width - 1:
                assert fault(path).code == "adapter_untrained"
            else:
                assert sources.inspect(path).readable


def test_a_format_that_we_do_not_know_is_zero_only_if_all_its_bytes_are(make: Make) -> None:
    unknown: Tensors = {A: ("F32", TRAINED), B: ("F6_E9", b"\0\x80")}
    assert sources.inspect(make(weights=unknown)).readable
    unknown[B] = ("F6_E9", b"\0\0")
    assert fault(make(weights=unknown)).code == "adapter_untrained"


def test_the_factor_that_starts_at_zero_in_an_embedding_is_a(make: Make) -> None:
    stem = "base_model.model.model.embed_tokens"
    tensors: Tensors = {
        f"{stem}.lora_embedding_A": ("F32", ZERO),
        f"{stem}.lora_embedding_B": ("F32", TRAINED),
    }
    assert fault(make(weights=tensors)).code == "adapter_untrained"


@pytest.mark.parametrize("where", [0, (1 << 20) - 1, 1 << 20, 5 << 19])
def test_the_one_number_that_is_not_zero_is_found_in_any_block(make: Make, where: int) -> None:
    raw = bytearray((5 << 19) + 4)
    assert fault(make(weights={A: ("F32", ZERO), B: ("F32", bytes(raw))})).code == (
        "adapter_untrained"
    )
    raw[where] = 1
    assert sources.inspect(make(weights={A: ("F32", ZERO), B: ("F32", bytes(raw))})).readable


# --- revision and fingerprint ------------------------------------------------------


def test_a_revision_follows_the_content_and_nothing_else(make: Make, tmp_path: Path) -> None:
    path = make()
    first = sources.revision(path, None)
    assert len(first) == 8
    assert int(first, 16) >= 0

    moved = tmp_path / "elsewhere"
    Path(path).rename(moved)
    (moved / "README.md").write_text("not part of it")
    os.utime(moved / "adapter_config.json", (0, 0))
    assert sources.revision(str(moved), "ignored where the files can be read") == first
    assert sources.revision(f"{moved}/../elsewhere/", None) == first


def test_a_revision_changes_with_every_part(make: Make) -> None:
    def revision(*args: Any, **kwargs: Any) -> str:
        return sources.revision(make(*args, **kwargs), None)

    whole = safetensors(PAIR)
    changed = bytearray(whole)
    changed[-1] ^= 1
    config = json.dumps(CONFIG).encode()
    seen = [
        revision(),
        revision({"r": 16}),
        revision(weights=bytes(changed)),
        revision(weights=whole + b"\0"),
        revision(config + whole[:1], whole[1:]),  # the same bytes, cut elsewhere
    ]
    Path(make(), "adapter_model.safetensors").unlink()
    seen += [revision(name="adapter_model.bin")]
    assert len(set(seen)) == len(seen)


def test_weights_that_vllm_does_not_use_do_not_count(make: Make) -> None:
    path = make()
    first = sources.revision(path, None)
    Path(path, "adapter_model.bin").write_bytes(b"older")
    assert sources.revision(path, None) == first


def test_a_revision_without_files_follows_path_and_declaration() -> None:
    seen = [
        sources.revision("hf://org/a", None),
        sources.revision("hf://org/a", ""),
        sources.revision("hf://org/a", "v1"),
        sources.revision("hf://org/b", "v1"),
        sources.revision("/not/here", "v1"),
        sources.revision("/not/hereév", "1"),
    ]
    assert len(set(seen)) == len(seen)
    assert sources.revision("hf://org/a", "v1") == seen[2]
    assert len(sources.revision("\ud800", "\ud800")) == 8


def test_a_fingerprint_changes_with_the_files(make: Make) -> None:
    path = make()
    first = sources.fingerprint(path)
    assert first is not None
    assert sources.fingerprint(path) == first

    weights = Path(path, "adapter_model.safetensors")
    os.utime(weights, ns=(1, 1))
    second = sources.fingerprint(path)
    assert second != first

    fresh = weights.with_suffix(".new")  # same size and time, other file
    fresh.write_bytes(weights.read_bytes())
    os.utime(fresh, ns=(1, 1))
    fresh.rename(weights)
    assert sources.fingerprint(path) not in (first, second)


# --- anything at all ---------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("adapters")


def judge(folder: Path, config: bytes, weights: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    try:
        assert sources.inspect(str(folder), 64).readable
    except ProxyError as error:
        assert error.message.isprintable()  # noqa: PT017 - either outcome is right
        assert len(error.message) < 500  # noqa: PT017
    assert len(sources.revision(str(folder), None)) == 8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(raw=st.binary(max_size=200))
def test_any_bytes_as_config(scratch: Path, raw: bytes) -> None:
    judge(scratch, raw, safetensors(PAIR))


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, max_size=3))
def test_any_values_in_the_config(scratch: Path, changes: dict[str, object]) -> None:
    judge(scratch, json.dumps(CONFIG | changes).encode(), safetensors(PAIR))


@FUZZ
@given(
    raw=st.binary(max_size=300)
    | st.binary(max_size=300).map(lambda raw: struct.pack("<Q", len(raw)) + raw)
)
def test_any_bytes_as_weights(scratch: Path, raw: bytes) -> None:
    judge(scratch, json.dumps(CONFIG).encode(), raw)


@FUZZ
@given(
    header=st.dictionaries(
        st.sampled_from([A, B, "__metadata__", "lm_head.weight"]) | st.text(max_size=8),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "X"]) | JSON,
                "shape": JSON,
                "data_offsets": st.lists(st.integers(-4, 70), max_size=3) | JSON,
            }
        ),
        max_size=4,
    ),
    data=st.binary(max_size=64),
)
def test_any_header(scratch: Path, header: dict[str, object], data: bytes) -> None:
    judge(scratch, json.dumps(CONFIG).encode(), with_header(header, data))


@FUZZ
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_one_byte_of_a_sound_file_changed(scratch: Path, at: int, byte: int) -> None:
    raw = bytearray(safetensors(PAIR))
    raw[at % len(raw)] = byte
    judge(scratch, json.dumps(CONFIG).encode(), bytes(raw))
