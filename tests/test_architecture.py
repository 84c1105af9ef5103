"""Imports point one way: a module knows only modules of the layers below it.

The pure layers also keep away from what would make them impure: the event loop, sockets,
clocks, chance, logs and files.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_proxy

PACKAGE = Path(lora_proxy.__file__).parent

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"__init__", "types", "errors"}),
    frozenset(
        {
            "access",
            "admission",
            "catalog",
            "health",
            "llamafactory",
            "residency",
            "retries",
            "rewrite",
            "routing",
        }
    ),
    frozenset(
        {
            "background",
            "body",
            "draft",
            "connection",
            "metrics",
            "server",
            "settings",
            "sources",
            "store",
            "vllm",
        }
    ),
    frozenset({"call", "config", "gate", "upstream", "versions"}),
    frozenset({"discovery", "loader", "relay"}),
    frozenset({"member"}),
    frozenset({"fleet"}),
    frozenset({"forward"}),
    frozenset({"admin", "doctor", "lane", "proxy"}),
    frozenset({"app"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
"""From the bottom up. Some of the modules are planned, and may be absent."""

LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}

PURE = LAYERS[0] | LAYERS[1]

IMPURE = [
    "aiohttp",
    "asyncio",
    "concurrent",
    "datetime",
    "glob",
    "http.client",
    "http.server",
    "httptools",
    "io",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "requests",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "urllib.request",
    "uvloop",
]

IMPURE_CALLS = frozenset({"input", "open", "print"})


def imported(source: str) -> set[str]:
    """Every module that a source imports, wherever it does so: dotted, ours in full.

    `from lora_proxy import x` counts as `lora_proxy.x`: what it names is a module, or a
    constant of `__init__`.
    """
    return set(_imported(ast.parse(source)))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The package is flat: a relative import is relative to the package.
            within = ["lora_proxy"] if node.level else []
            module = ".".join([*within, *([node.module] if node.module else [])])
            if module == "lora_proxy":
                yield from (f"lora_proxy.{alias.name}" for alias in node.names)
            else:
                yield module


def faults(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module."""
    found = []
    for name in sorted(imported(source)):
        top, _, ours = name.partition(".")
        if top != "lora_proxy":
            if module in PURE and any(f"{name}.".startswith(f"{bad}.") for bad in IMPURE):
                found.append(f"{module} is pure and imports {name}")
            continue
        # A name that is no module (`lora_proxy.__version__`) is one of `__init__`.
        target = ours if ours in LAYER_OF else "__init__"
        if LAYER_OF[target] >= LAYER_OF[module] and target != "__init__":
            found.append(f"{module} imports {target}, which is not in a layer below")
    if module in PURE:
        called = {
            node.func.id
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        found += [f"{module} is pure and calls {name}()" for name in sorted(called & IMPURE_CALLS)]
    return found


SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(PACKAGE.glob("*.py"))}


def test_the_package_is_flat() -> None:
    nested = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]
    assert nested == []


def test_every_module_has_its_place() -> None:
    assert sorted(SOURCES.keys() - LAYER_OF.keys()) == []
    assert sum(map(len, LAYERS)) == len(LAYER_OF)


@pytest.mark.parametrize("module", sorted(SOURCES.keys() & LAYER_OF.keys()))
def test_imports_point_one_way(module: str) -> None:
    assert faults(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("catalog", "from lora_proxy.routing import rank"),
        ("catalog", "from lora_proxy import routing"),
        ("catalog", "import lora_proxy.routing"),
        ("catalog", "from .routing import rank"),
        ("catalog", "from . import routing"),
        ("types", "from lora_proxy.errors import ProxyError"),
        ("routing", "from lora_proxy.fleet import Fleet"),
        ("vllm", "def load():\n    from lora_proxy import upstream"),
        ("routing", "if TYPE_CHECKING:\n    from lora_proxy.fleet import Fleet"),
        ("fleet", "from lora_proxy.app import serve"),
        ("routing", "import asyncio"),
        ("routing", "import os.path"),
        ("routing", "from urllib.request import urlopen"),
        ("routing", "from concurrent.futures import ThreadPoolExecutor"),
        ("errors", "from time import monotonic"),
        ("residency", "def acquire():\n    import random"),
        ("catalog", "names = open('names').read()"),
    ],
)
def test_a_step_out_of_line_is_seen(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("catalog", "from lora_proxy.errors import ProxyError\nfrom lora_proxy import types"),
        ("catalog", "from bisect import bisect_left\nfrom urllib.parse import unquote"),
        ("fleet", "from lora_proxy.member import Member\nimport asyncio"),
        ("cli", "from lora_proxy import __version__\nfrom lora_proxy.app import serve"),
        ("proxy", "print(open('x'))"),
    ],
)
def test_a_step_in_line_is_none(module: str, source: str) -> None:
    assert faults(module, source) == []
