"""Shows the proxy at work before a real vLLM, and checks every answer: `make demo`.

Brings `stage` and `scenes` together and tells the user what takes how long. All of the demo
but the making of the models is standard library only. The exit code is 0 if every answer
was what it must be, 1 if one was not or a server did not start.
"""

import argparse
import io
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calls import Call
from scenes import BOLD, RED, Scenes, forget, paint, served_adapters
from stage import SIGNALS, Kept, Stage, StageError, find_kept, stop_kept

FOLDER = Path(__file__).resolve().parent.parent / ".demo"


def main() -> int:
    """Runs the demo, or stops a kept one; returns the process's exit code."""
    parser = argparse.ArgumentParser(description="lora-proxy before a real vLLM")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--vllm-python", type=Path, help="an interpreter that has vLLM")
    task.add_argument("--stop", action="store_true", help="stop what was left running")
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    arguments = parser.parse_args()
    if arguments.vllm_python is not None and not arguments.vllm_python.exists():
        parser.error(f"{arguments.vllm_python} does not exist: make vllm-env")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals without a check mark
    if arguments.stop:
        print("stopped" if stop_kept(FOLDER) else "nothing was left running")
        return 0
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # all of them end it as Ctrl-C does
    try:
        return demonstrate(arguments.vllm_python.absolute(), keep=arguments.keep)
    except StageError as error:
        print(f"\n{paint(RED, '✘')} {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 128 + signal.SIGINT


def demonstrate(vllm_python: Path, *, keep: bool) -> int:
    """Sets the stage, plays the scenes, says how it went; returns the exit code."""
    with Stage(FOLDER, vllm_python, tick=lambda: print(".", end="", flush=True)) as stage:
        set_up(stage)
        scenes = Scenes(stage.proxy, stage.vllm, stage.answers())
        scenes.play()
        print(f"\n{scenes.passed} of {scenes.passed + scenes.failed} checks passed")
        if scenes.failed:
            print(f"logs: {shown(stage.proxy_log)}, {shown(stage.vllm_log)}")
        if keep and find_kept(FOLDER) is None:
            stage.keep()
        if kept := find_kept(FOLDER):
            print(how_to_talk(kept, Scenes(kept.proxy, kept.vllm, stage.answers()), stage))
        else:
            print("stopping both servers; to leave them running: make demo KEEP=1")
        return 1 if scenes.failed else 0


def set_up(stage: Stage) -> None:
    """Brings everything up; a vLLM that was left running is used again, without its adapters."""
    began = time.monotonic()
    with timed("models  a tiny base model and two trained LoRA adapters"):
        for line in stage.make_models():
            print(f"\n        {line}", end="", flush=True)
    if stage.reuse_vllm():
        print(f"vLLM    the one that was left running at {stage.vllm}")
        for served in served_adapters(stage.vllm):
            forget(stage.vllm, served).send()
    else:
        with timed("vLLM    starting; takes 30 to 90 s "):
            stage.start_vllm()
    with timed("proxy   starting"):
        stage.start_proxy()
    print(f"up after {time.monotonic() - began:.0f} s")


@contextmanager
def timed(text: str) -> Iterator[None]:
    """Says what is being done, and when it is done how long it took."""
    print(text, end="", flush=True)
    began = time.monotonic()
    yield
    print(f" ({time.monotonic() - began:.1f} s)")


def shown(path: Path) -> str:
    """A path as the user finds it from the project's folder."""
    return str(path.relative_to(FOLDER.parent))


def how_to_talk(kept: Kept, scenes: Scenes, stage: Stage) -> str:
    """What the user of a kept demo needs to know."""
    return f"""
{paint(BOLD, "Left running")}
  lora-proxy  {kept.proxy}  log: {shown(stage.proxy_log)}
  vLLM        {kept.vllm}  log: {shown(stage.vllm_log)}
Talk to it with any OpenAI client, base URL {kept.proxy}/v1, any key:
$ {Call(f"{kept.proxy}/v1/models").curl}
$ {scenes.chat("sql").curl}
Stop both with: make demo-stop"""


if __name__ == "__main__":
    sys.exit(main())
