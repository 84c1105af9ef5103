"""Makes a tiny chat model and LoRA adapters whose answers tell who gave them, once.

    python demo/tiny_models.py OUT_DIR

writes `OUT_DIR/base`, `OUT_DIR/adapters/NAME` and `OUT_DIR/answers.json`, and does nothing
when they are there and up to date. Owns when, where and how safely they are made; `tiny_recipe`
owns what is made. Runs in vLLM's environment, where torch, transformers and peft live.
"""

import contextlib
import fcntl
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

STAMP = "stamp"
LIBRARIES = ("peft", "tokenizers", "torch", "transformers")
RECIPE = Path(__file__).with_name("tiny_recipe.py")


def main(arguments: list[str]) -> int:
    """Builds into the one folder given; returns the process's exit code."""
    if len(arguments) != 1:
        print("usage: python demo/tiny_models.py OUT_DIR", file=sys.stderr)
        return 2
    out = Path(arguments[0]).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.with_name(f".{out.name}.lock")):
        if _stamp_of(out) == _stamp():
            return 0
        if out.exists() and _stamp_of(out) is None and any(out.iterdir()):
            print(f"{out} holds something else: name an empty or new folder", file=sys.stderr)
            return 2
        return _replace(out)


def _stamp() -> str:
    """What the result depends on: this recipe, and the libraries that carry it out."""
    digest = hashlib.sha256(RECIPE.read_bytes())
    for library in LIBRARIES:
        digest.update(f"{library}=={metadata.version(library)}\n".encode())
    return digest.hexdigest()


def _stamp_of(out: Path) -> str | None:
    try:
        return (out / STAMP).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; a demo and a test run may start together."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(out: Path) -> int:
    """Builds beside `out` and renames, so that an interrupted run leaves nothing half done."""
    import tiny_recipe  # noqa: PLC0415 - torch takes seconds to import, and is mostly not needed

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        fresh, stale = Path(scratch) / "fresh", Path(scratch) / "stale"
        fresh.mkdir()
        try:
            tiny_recipe.build(fresh)
        except tiny_recipe.WrongAnswerError as error:
            print(f"the tiny models came out wrong: {error}", file=sys.stderr)
            return 1
        (fresh / STAMP).write_text(_stamp())
        if out.exists():
            out.rename(stale)
        fresh.rename(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
