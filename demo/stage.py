"""Puts a real vLLM and the proxy on the demo's stage, and takes them off again.

Owns the models, the processes, their logs, and what is kept running between two runs. Knows
nothing of requests, answers, or how the demo looks. Needs /proc, as vLLM's CPU build does.

Both servers run under `vllm_server.KEEPER`, which ends them when the pipe from their owner
closes; so nothing outlives this process, however it ends. What is to be kept running passes
to a fork of it, the holder, that does nothing but hold the pipes' ends until it is told to go.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NoReturn, Self
from urllib.parse import urlsplit

from vllm_server import KEEPER, VllmServer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
VLLM_SECONDS = 240
PROXY_SECONDS = 30
TICK_SECONDS = 5
HINT = """\
vLLM did not start. What most often helps: 3 GB of free memory (a kept demo holds as much:
`make demo-stop`), and its environment made anew: `rm -r .venv-vllm`, then `make vllm-env`."""

CONFIG = """\
# Written by `make demo`, and written anew by each.
listen: 127.0.0.1:0
upstreams:
  - {{name: vllm, url: "{vllm}"}}
adapters:
  - name: sql
    path: {sql}
    aliases: [gpt-3.5-turbo]
  - name: pirate
    path: {pirate}
"""


class StageError(Exception):
    """Something could not be put on the stage; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What an earlier run left running.

    Attributes:
        holder: The process id of what holds both servers.
        born: Its start in clock ticks: by now the id may be another process's.
        models: Which build of the models vLLM has read.
        vllm: The server's URL.
        proxy: Likewise.
    """

    holder: int
    born: str
    models: str
    vllm: str
    proxy: str


class Stage:
    """The demo's servers, for as long as the context lasts, unless they are kept.

    Args:
        folder: Where models, logs and state lie; made if it does not exist.
        vllm_python: An interpreter that has vLLM.
        tick: Called every few seconds of a long wait.
    """

    def __init__(self, folder: Path, vllm_python: Path, tick: Callable[[], None]) -> None:
        self.models = folder / "models"
        self.vllm_log = folder / "logs" / "vllm.log"
        self.proxy_log = folder / "logs" / "proxy.log"
        self.vllm = ""
        self.proxy = ""
        self._folder = folder
        self._vllm_python = vllm_python
        self._tick = tick
        self._server: VllmServer | None = None
        self._proxy_process: subprocess.Popen[bytes] | None = None
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.vllm_log.parent.mkdir(parents=True, exist_ok=True)
        lock = self._files.enter_context((self._folder / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError("another `make demo` is at work in this folder: let it end") from None
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C shall not stop the stopping
        if self._proxy_process is not None:
            _stop(self._proxy_process)
        if self._server is not None:
            self._server.stop()
        self._files.close()

    def make_models(self) -> Iterator[str]:
        """Makes the models, if need be; yields the maker's progress, line by line.

        Raises:
            StageError: The maker failed.
        """
        script = Path(__file__).with_name("tiny_models.py")
        command = [str(self._vllm_python), str(script), str(self.models)]
        lines = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as maker:
            for line in maker.stdout or ():
                lines.append(line)
                yield line.rstrip()
        if maker.returncode:
            raise StageError(f"the models could not be made:\n{''.join(lines[-20:])}")

    def answers(self) -> dict[str, str]:
        """The `prompt`, and what the models `base`, `sql` and `pirate` answer to it."""
        answers: dict[str, str] = json.loads((self.models / "answers.json").read_text())
        return answers

    def reuse_vllm(self) -> bool:
        """Takes the vLLM of a kept stage, if all of that is well and has the models of today.

        Otherwise it is stopped.
        """
        kept = find_kept(self._folder)
        if kept is None:
            return False
        well = _is_healthy(kept.vllm) and _is_healthy(kept.proxy)
        if not well or kept.models != self._models_build():
            stop_kept(self._folder)
            return False
        self.vllm = kept.vllm
        return True

    def start_vllm(self) -> None:
        """Starts a vLLM and waits until it serves.

        Raises:
            StageError: It does not; with its log's end.
        """
        for log in (self.vllm_log, self.proxy_log):
            log.unlink(missing_ok=True)  # nothing is kept, so nobody writes to them
        server = VllmServer(self._vllm_python, self.models / "base", log=self.vllm_log)
        self._server = server
        server.start()
        deadline = time.monotonic() + VLLM_SECONDS
        while True:
            try:
                server.wait_ready(TICK_SECONDS)
                break
            except RuntimeError as error:
                if not server.running or time.monotonic() > deadline:
                    raise StageError(f"{error}\n\n{HINT}") from None
            self._tick()
        self.vllm = server.url

    def start_proxy(self) -> None:
        """Starts a proxy before `vllm`, on a port of its choice, and waits until it is ready.

        Raises:
            StageError: It does not start; with its log's end.
        """
        config = self._folder / "proxy.yaml"
        # JSON's strings are YAML's too, whatever the path holds.
        paths = {
            name: json.dumps(str(self.models / "adapters" / name)) for name in ("sql", "pirate")
        }
        config.write_text(CONFIG.format(vllm=self.vllm, **paths))
        command = [str(Path(sys.executable).with_name("lora-proxy")), "serve", "--config"]
        with self.proxy_log.open("ab") as log:
            start = log.tell()  # a kept proxy writes there too
            self._proxy_process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", KEEPER, *command, str(config)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not k.startswith("LORA_PROXY_")},
                start_new_session=True,
            )
        deadline = time.monotonic() + PROXY_SECONDS
        while not self.proxy or not _is_healthy(self.proxy, "/ready"):
            ended = self._proxy_process.poll() is not None  # asked first: then the log is whole
            text = self.proxy_log.read_bytes()[start:].decode(errors="replace")
            if ended or time.monotonic() > deadline:
                raise StageError(f"the proxy did not start:\n{text[-2000:]}")
            if listening := re.search(r"listening on (http://[\w.:]+)", text):
                self.proxy = listening[1]
            time.sleep(0.05)

    def keep(self) -> None:
        """Leaves both servers running when this process ends."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # it is done wholly, or not at all
        holder = os.fork()
        if holder == 0:
            self._hold()
        self._server = self._proxy_process = None
        kept = Kept(holder, _born(holder) or "", self._models_build(), self.vllm, self.proxy)
        fresh = self._folder / "kept.json.new"
        fresh.write_text(json.dumps(asdict(kept)) + "\n")
        fresh.replace(self._folder / "kept.json")

    def _hold(self) -> NoReturn:
        """What the holder does: keeps the pipes open, until SIGTERM."""
        try:
            self._files.close()  # its copy of the lock, which would stay locked
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            signal.sigwait({signal.SIGTERM})
        finally:
            os._exit(0)  # none of what its parent would do at its end

    def _models_build(self) -> str:
        return str((self.models / "answers.json").stat().st_mtime_ns)


def find_kept(folder: Path) -> Kept | None:
    """What is kept running, if anything is."""
    try:
        kept = Kept(**json.loads((folder / "kept.json").read_text()))
    except FileNotFoundError:
        return None
    return kept if _born(kept.holder) == kept.born else None


def stop_kept(folder: Path) -> bool:
    """Ends what is kept running, and returns when it has ended; False if nothing was."""
    kept = find_kept(folder)
    if kept is not None:
        os.kill(kept.holder, signal.SIGTERM)
        while _born(kept.holder) == kept.born or _is_healthy(kept.vllm) or _is_healthy(kept.proxy):
            time.sleep(0.05)
    (folder / "kept.json").unlink(missing_ok=True)
    return kept is not None


def _born(process: int) -> str | None:
    """When a process started; None if it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # "PID (COMMAND) STATE …", the start is field 22; see proc(5). A zombie has ended.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Lets the keeper's server end by itself for 10 s, then has the keeper kill it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def _is_healthy(url: str, path: str = "/health") -> bool:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
