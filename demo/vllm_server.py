"""Starts and stops a real vLLM server on the CPU, from any Python.

Owns the command line, the environment and the processes; knows nothing of models, prompts or
the proxy. Standard library only: vLLM itself runs under the `python` that it is given.

No process outlives its owner. vLLM is an API server and an engine process, and only a whole
process group can be killed for certain; so the group is led by a small keeper, whose standard
input is a pipe from the owner. When the pipe closes (the owner called `kill`, or has died in
whatever way) or when the API server has ended, the keeper kills the group, itself included.
PR_SET_PDEATHSIG would not do: it reaches the API server only, and it fires when the *thread*
that started the server ends.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

KEEPER = """
import os, signal, subprocess, sys, threading

def kill_group():
    os.killpg(0, signal.SIGKILL)

def await_owner():
    sys.stdin.buffer.read()
    kill_group()

try:
    # Handlers, not SIG_IGN: that the server would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=await_owner, daemon=True).start()
    print("exit code", server.wait(), flush=True)
finally:
    kill_group()
"""

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
RUNTIME_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
POLL_SECONDS = 0.1
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through http_proxy


class VllmServer:
    """One vLLM server on 127.0.0.1; may be started again, on the same port, after its end.

    Args:
        python: An interpreter that has vLLM.
        model: The base model's folder.
        port: Where to listen; a free one by default.
        name: What the base model is served as.
        max_loras: Adapters in one batch.
        max_cpu_loras: Adapters in memory.
        max_lora_rank: The highest rank it takes.
        max_model_len: Context length in tokens.
        lora_modules: Adapters loaded at the start, name to folder.
        runtime_updating: Whether it has the load and unload calls.
        enable_lora: Whether it takes adapters at all.
        log: Its output is appended here.
        extra_args: More of vLLM's own flags.
    """

    def __init__(  # noqa: PLR0913 - they are vLLM's flags, each with a default
        self,
        python: Path,
        model: Path,
        *,
        log: Path,
        port: int | None = None,
        name: str = "tiny",
        max_loras: int = 2,
        max_cpu_loras: int = 4,
        max_lora_rank: int = 64,
        max_model_len: int = 4096,
        lora_modules: Mapping[str, Path] = MappingProxyType({}),
        runtime_updating: bool = True,
        enable_lora: bool = True,
        extra_args: Iterable[str] = (),
    ) -> None:
        self.port = port or _free_port()
        self.log = log
        self._runtime_updating = runtime_updating
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", name),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--max-model-len", str(max_model_len), "--dtype", "float32", "--enforce-eager"),
        ]
        if enable_lora:
            self._command += [
                *("--enable-lora", "--max-loras", str(max_loras)),
                *("--max-cpu-loras", str(max_cpu_loras), "--max-lora-rank", str(max_lora_rank)),
            ]
        if lora_modules:
            pairs = (f"{module}={path}" for module, path in lora_modules.items())
            self._command += ["--lora-modules", *pairs]
        self._command += extra_args

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether its processes have been started and have not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the processes; does not wait for them to be ready."""
        if self.running:
            raise RuntimeError(f"the server at {self.url} is running already")
        environment = os.environ | ENVIRONMENT
        environment.pop(RUNTIME_UPDATING, None)
        if self._runtime_updating:
            environment[RUNTIME_UPDATING] = "True"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", KEEPER, *self._command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait_ready(self, timeout: float = 240) -> None:
        """Blocks until `GET /health` is 200, at most `timeout` seconds.

        Raises:
            RuntimeError: The server has ended, or is not ready in time; with the log's end.
        """
        deadline = time.monotonic() + timeout
        while not self._is_healthy():
            if not self.running:
                raise RuntimeError(f"vLLM ended at its start:\n{self._log_end()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"vLLM is not ready after {timeout} s:\n{self._log_end()}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Asks the server to end, as a container runtime would; kills it after 15 s."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        self.kill()

    def kill(self) -> None:
        """Ends every process of the server with SIGKILL; its port is free on return."""
        if self._process is None:
            return
        group = self._process.pid
        if self._process.poll() is None:
            os.killpg(group, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        # The keeper has gone, and so has every signal to the group; an end may take a moment.
        while _is_alive(group):
            time.sleep(POLL_SECONDS / 10)
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_healthy(self) -> bool:
        try:
            with OPENER.open(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _log_end(self, lines: int = 40) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _is_alive(group: int) -> bool:
    """Whether a process of the group still runs.

    Zombies do not count: where process 1 does not reap, as in many a container, they stay.
    """
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "PID (COMMAND) STATE PPID PGRP …"; the command may hold anything, ")" as well
            state, _, process_group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False
