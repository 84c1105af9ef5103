"""What several test modules share: event loops, a fake vLLM, a real one, and its models.

A test that asks for the real server, or for its models, is marked `real`, gets the time that a
first start takes, and runs after all others. Without vLLM's environment it is skipped; with
CI=true it fails.
"""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import proxied as proxies
import pytest
import uvloop
from fake_vllm import FakeVllm
from vllm_server import VllmServer

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("LORA_PROXY_TEST_CACHE") or ROOT / ".demo")
VLLM_PYTHON = Path(
    os.environ.get("LORA_PROXY_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python"
)
NEEDS_VLLM = {"models", "real_vllm"}
REAL_SECONDS = 400

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

FACTORIES: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(
    item: pytest.Function,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop of asyncio itself, or each of those that the test's module names in `LOOPS`."""
    return {name: FACTORIES[name] for name in getattr(item.module, "LOOPS", ("asyncio",))}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NEEDS_VLLM & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.timeout(REAL_SECONDS))
    items.sort(key=lambda item: item.get_closest_marker("real") is not None)


@pytest.fixture
async def fake() -> AsyncIterator[FakeVllm]:
    async with FakeVllm() as server:
        yield server


@pytest.fixture
def proxied() -> proxies.Start:
    """Starts a proxy. A test that asks for it holds for every front end."""
    return proxies.proxied


@dataclass(frozen=True, slots=True)
class Models:
    """What `demo/tiny_models.py` made.

    Attributes:
        base: The base model's folder.
        adapters: The folder of the adapters' folders.
        prompt: A question that every model answers in its own way.
        answers: What `base`, `sql` and `pirate` say to it.
    """

    base: Path
    adapters: Path
    prompt: str
    answers: Mapping[str, str]


@pytest.fixture(scope="session")
def models() -> Models:
    if not VLLM_PYTHON.exists():
        missing = f"no vLLM environment at {VLLM_PYTHON}; `make test` makes it"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    folder = CACHE / "models"
    # `make test` keeps the source folder off this process's path; the script needs its own.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [VLLM_PYTHON, ROOT / "demo" / "tiny_models.py", folder]
    subprocess.run(command, check=True, env=environ)
    answers = json.loads((folder / "answers.json").read_text())
    return Models(folder / "base", folder / "adapters", answers.pop("prompt"), answers)


@pytest.fixture(scope="session")
def real_vllm(models: Models) -> Iterator[VllmServer]:
    """One server for the whole session, base model `tiny`; a test leaves it as it found it."""
    log = CACHE / "vllm-test.log"
    log.unlink(missing_ok=True)
    with VllmServer(VLLM_PYTHON, models.base, log=log) as server:
        server.wait_ready()
        yield server
