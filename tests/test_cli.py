"""The command line: what it prints, where, and with which exit status."""

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import lora_proxy
from lora_proxy.cli import main

UPSTREAM = ("--upstream", "http://127.0.0.1:1")  # nothing listens there, and nothing asks


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORA_PROXY_CONFIG", "LORA_PROXY_UPSTREAMS", "LORA_PROXY_ADAPTERS"):
        monkeypatch.delenv(name, raising=False)


def make_adapter(folder: Path, rank: int = 16) -> Path:
    """The least that PEFT would write: one module's two halves, neither of them zero."""
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    size = 4 * rank
    header = json.dumps(
        {
            f"{stem}.lora_A.weight": {
                "dtype": "F32",
                "shape": [rank, 1],
                "data_offsets": [0, size],
            },
            f"{stem}.lora_B.weight": {
                "dtype": "F32",
                "shape": [1, rank],
                "data_offsets": [size, 2 * size],
            },
        }
    ).encode()
    weights = struct.pack("<f", 0.5) * (2 * rank)
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + weights
    )
    return folder


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "lora_proxy", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_check_says_what_it_sees_of_each_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_adapter(tmp_path / "good")
    adapters = ("--adapter", f"sql={good}", "--adapter", "far=/only/vllm/sees/this")
    assert main(["check", *UPSTREAM, *adapters]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "adapter sql: ok, rank 16, base tiny",
        "adapter far: not readable from here; vLLM judges it at its load",
        "ok: the configuration names 1 upstream(s) and 2 adapter(s)",
    ]
    assert err == ""


def test_check_fails_for_an_adapter_that_vllm_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    good = make_adapter(tmp_path / "good")
    adapters = ("--adapter", f"bad={tmp_path / 'empty'}", "--adapter", f"sql={good}")
    assert main(["check", *UPSTREAM, *adapters]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == ["adapter sql: ok, rank 16, base tiny"]
    (line,) = err.splitlines()
    assert line.startswith("error: adapter bad: ")
    assert "adapter_config.json" in line


@pytest.mark.parametrize(
    ("limits", "status"),
    [(("8", "8"), 2), (("8", "16"), 0), (("8", None), 0)],
    ids=["fits nowhere", "fits one", "one is not known"],
)
def test_check_asks_for_one_server_that_takes_the_rank(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limits: tuple[str | None, ...],
    status: int,
) -> None:
    file = tmp_path / "lora-proxy.yaml"
    upstreams = [
        {"url": f"http://gpu-{index}:1"} | ({"max_lora_rank": int(limit)} if limit else {})
        for index, limit in enumerate(limits)
    ]
    adapter = {"name": "sql", "path": str(make_adapter(tmp_path / "a", rank=16))}
    file.write_text(json.dumps({"upstreams": upstreams, "adapters": [adapter]}))
    assert main(["check", "--config", str(file)]) == status
    assert ("rank 16" in capsys.readouterr().err) == (status == 2)


@pytest.mark.parametrize("command", ["serve", "check"])
def test_faults_go_to_stderr_one_line_each(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--upstream", "gpu:8000", "--listen", "8080", "--adapter", "sql=./sql"]
    assert main([command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(":")[:2] for line in lines] == [
        ["error", " adapters[0].path"],
        ["error", " listen"],
        ["error", " upstreams[0].url"],
    ]
    assert "(--adapter)" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: COMMAND"),
        (["serv"], "error: argument COMMAND: invalid choice"),
        (["serve", "--upstreams", "x"], "error: unrecognized arguments: --upstreams x"),
        (["check", "--listen"], "error: argument --listen: expected one argument"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(message)
    assert second.startswith("try: lora-proxy")


def test_the_module_is_the_command() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"lora-proxy {lora_proxy.__version__}\n")


def test_a_mistake_ends_in_a_message_and_no_traceback() -> None:
    done = run("serve", "--config", "/no/such/file.yaml")
    assert done.returncode == 2
    assert done.stderr == (
        "error: /no/such/file.yaml: cannot be read: No such file or directory; "
        "give the file with --config\n"
    )


def test_serve_says_where_it_listens_and_ends_at_sigterm() -> None:
    arguments = ["serve", "--listen", "127.0.0.1:0", *UPSTREAM]
    with subprocess.Popen(
        [sys.executable, "-m", "lora_proxy", *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            url = next(m[1] for m in (re.search(r"listening on (\S+)", x) for x in lines) if m)
            with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_serve_on_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("serve", "--listen", address, *UPSTREAM)
    assert done.returncode == 1
    assert f"error: cannot listen on {address}: " in done.stderr


def test_check_brings_in_no_server() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys; from lora_proxy.cli import main; status = main(sys.argv[1:]); "
                "print(status, 'aiohttp' in sys.modules)"
            ),
            "check",
            *UPSTREAM,
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "0 False"
