"""The control client against small servers, each with one habit of a vLLM or of a gateway."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from lora_proxy.errors import CODES, ProxyError
from lora_proxy.types import Card, Module
from lora_proxy.vllm import ControlClient, adopted, parse_error, permanent

SQL = Module("sql", "sql@0123abcd", "/adapters/sql")
BASE = {"id": "tiny", "object": "model", "root": "/m", "parent": None, "max_model_len": 1024}
LOADED = {"id": SQL.served, "root": SQL.path, "parent": "tiny", "max_model_len": None}
KEY = "sk-upstream-secret"

Answer = tuple[int, str | bytes | dict[str, Any]]


class FakeServer:
    """Answers each path with what it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {"/v1/models": (200, {"data": [BASE]})}
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[str | None] = []

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path, body))
        self.headers.append(request.headers.get("Authorization"))
        status, answer = self.answers.get(request.path, (404, {"detail": "Not Found"}))
        if isinstance(answer, dict):
            return web.json_response(answer, status=status)
        raw = answer.encode() if isinstance(answer, str) else answer
        return web.Response(status=status, body=raw)

    def load_answers(self, status: int, answer: str | bytes | dict[str, Any]) -> None:
        self.answers["/v1/load_lora_adapter"] = (status, answer)

    def serves(self, *cards: dict[str, Any]) -> None:
        self.answers["/v1/models"] = (200, {"object": "list", "data": [BASE, *cards]})


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def client(
    server: FakeServer, session: aiohttp.ClientSession
) -> AsyncIterator[ControlClient]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    async with TestServer(app) as running:
        yield ControlClient(session, str(running.make_url("/")), api_key=KEY, timeout=30)


async def refused(call: Awaitable[object]) -> ProxyError:
    """The error of a call that must fail, after what holds for every one of them."""
    with pytest.raises(ProxyError) as caught:
        await call
    error = caught.value
    assert error.message.isprintable()
    assert len(error.message) < 800
    assert KEY not in error.message
    assert SQL.served not in error.message
    return error


def nested(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "T", "param": None, "code": status}}


def flat(message: str, status: int) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": "T", "param": None, "code": status}


SHAPES = pytest.mark.parametrize("shape", [nested, flat])


# --- health and models -------------------------------------------------------------


async def test_health(server: FakeServer, client: ControlClient) -> None:
    server.answers["/health"] = (200, "")
    await client.healthy()
    server.answers["/health"] = (503, "")
    error = await refused(client.healthy())
    assert error.code == "upstream_connect"
    assert "503: Service Unavailable" in error.message
    assert server.asked == [("GET", "/health", None)] * 2


async def test_models(server: FakeServer, client: ControlClient) -> None:
    server.serves(LOADED, {"id": "odd", "object": "model"})
    assert await client.models() == [
        Card("tiny", "/m", None, 1024),
        Card(SQL.served, SQL.path, "tiny"),
        Card("odd", None, None),
    ]
    assert server.headers == [f"Bearer {KEY}"]


async def test_without_a_key_none_is_sent(
    server: FakeServer, client: ControlClient, session: aiohttp.ClientSession
) -> None:
    await ControlClient(session, client._url, timeout=30).models()
    assert server.headers == [None]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello",
        b"[]",
        b'"data"',
        b"{}",
        b'{"data":{}}',
        b'{"data":["tiny"]}',
        b'{"data":[{"id":1}]}',
        b'{"data":[{"root":"/m"}]}',
        b'{"data":[{"id":"a","root":1}]}',
        b'{"data":[{"id":"\xff"}]}',
        b'{"data":' + b"[" * 100_000,
        b"<html>welcome</html>",
    ],
)
async def test_models_that_are_none(
    server: FakeServer, client: ControlClient, answer: bytes
) -> None:
    server.answers["/v1/models"] = (200, answer)
    error = await refused(client.models())
    assert error.code == "upstream_invalid"
    assert not error.replayable


async def test_models_without_end(server: FakeServer, client: ControlClient) -> None:
    server.answers["/v1/models"] = (200, b" " * (17 << 20))
    error = await refused(client.models())
    assert error.code == "upstream_invalid"
    assert "larger than" in error.message


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (302, "upstream_invalid"),
        (401, "upstream_invalid"),
        (404, "upstream_invalid"),
        (500, "upstream_invalid"),
        (502, "upstream_connect"),
        (503, "upstream_connect"),
        (504, "upstream_connect"),
    ],
)
async def test_models_refused(
    server: FakeServer, client: ControlClient, status: int, code: str
) -> None:
    server.answers["/v1/models"] = (status, {"error": f"not for {KEY}"})
    error = await refused(client.models())
    assert error.code == code
    assert ("api_key" in error.message) == (status == 401)


async def test_a_redirect_is_not_followed(session: aiohttp.ClientSession) -> None:
    """It would carry the upstream's key to wherever it points."""
    seen: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as running:
        client = ControlClient(session, str(running.make_url("/")), timeout=30)
        await refused(client.models())
        await refused(client.load(SQL))
    assert seen == ["/v1/models", "/v1/load_lora_adapter"]


# --- load --------------------------------------------------------------------------


async def test_load(server: FakeServer, client: ControlClient) -> None:
    server.load_answers(200, f"Success: LoRA adapter '{SQL.served}' added successfully.")
    assert await client.load(SQL) == SQL.served
    assert server.asked == [
        ("POST", "/v1/load_lora_adapter", {"lora_name": SQL.served, "lora_path": SQL.path})
    ]
    assert server.headers == [f"Bearer {KEY}"]


ALREADY = (
    f"The lora adapter '{SQL.served}' has already been loaded. If you want to load the adapter "
    "in place, set 'load_inplace' to True."
)


@SHAPES
@pytest.mark.parametrize("root", ["/adapters/sql", "/adapters/sql/", "/adapters/./sql"])
async def test_already_loaded_from_the_path_that_we_mean(
    server: FakeServer, client: ControlClient, shape: Callable[..., dict[str, Any]], root: str
) -> None:
    server.load_answers(400, shape(ALREADY, 400))
    server.serves(LOADED | {"root": root})
    assert await client.load(SQL) == SQL.served
    assert [path for _, path, _ in server.asked] == ["/v1/load_lora_adapter", "/v1/models"]


@pytest.mark.parametrize("root", ["/adapters/other", None])
async def test_already_loaded_from_elsewhere(
    server: FakeServer, client: ControlClient, root: str | None
) -> None:
    server.load_answers(400, nested(ALREADY, 400))
    server.serves(LOADED | {"root": root})
    error = await refused(client.load(SQL))
    assert error.code == "adapter_conflict"
    assert permanent(error)


async def test_already_loaded_and_gone_again(server: FakeServer, client: ControlClient) -> None:
    """Another proxy unloaded it between the two calls: nothing is wrong with the adapter."""
    server.load_answers(400, nested(ALREADY, 400))
    error = await refused(client.load(SQL))
    assert error.code == "adapter_load_failed"
    assert not permanent(error)


async def test_already_loaded_but_nobody_can_say_from_where(
    server: FakeServer, client: ControlClient
) -> None:
    server.load_answers(400, nested(ALREADY, 400))
    server.answers["/v1/models"] = (200, b"rubbish")
    assert (await refused(client.load(SQL))).code == "upstream_invalid"


RANK = (
    "Call to add_lora method failed: Worker failed with error 'LoRA rank 128 is greater than "
    "max_lora_rank 64.', please check the stack trace above for the root cause"
)
DORA = (
    "Call to add_lora method failed: Worker failed with error 'vLLM does not yet support DoRA.',"
    " please check the stack trace above for the root cause"
)
NO_LORA = "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA."
NO_LORA_IN_0_8 = (
    "Call to add_lora method failed: 'GPUModelRunner' object has no attribute 'lora_manager'"
)
MODULES = (
    f"While loading {SQL.path}, expected target modules in {{'q_proj'}} but received ['model.x']. "
    "Please verify that the loaded LoRA module is correct"
)


@SHAPES
@pytest.mark.parametrize(
    ("status", "message", "code", "named"),
    [
        (
            400,
            f"The lora adapter '{SQL.served}' conflicts with a served base model.",
            "name_conflict",
            ["'sql'", "rename"],
        ),
        (
            500,
            RANK,
            "adapter_rank_too_high",
            ["'sql'", "rank 128", "--max-lora-rank 64;", "--max-lora-rank 128"],
        ),
        (
            404,
            f"Loading lora {SQL.served} failed: No adapter found for {SQL.path}",
            "adapter_not_found",
            ["'sql'", SQL.path, "mounted"],
        ),
        (
            500,
            NO_LORA,
            "runtime_updating_disabled",
            ["--enable-lora"],
        ),
        (
            500,
            NO_LORA_IN_0_8,
            "runtime_updating_disabled",
            ["--enable-lora"],
        ),
        (
            404,
            "Not Found",
            "runtime_updating_disabled",
            ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "--enable-lora"],
        ),
        (500, DORA, "adapter_invalid", ["'sql'", "it: vLLM does not yet support DoRA; correct"]),
        (
            500,
            MODULES,
            "adapter_invalid",
            ["expected target modules"],
        ),
        (400, "1 validation error:\n  {'type': 'missing'}", "adapter_invalid", ["missing"]),
        (422, f"no use for {KEY}", "adapter_invalid", ["***"]),
        (500, f"{SQL.served} has no tensors", "adapter_invalid", ["refuses it: sql has no"]),
        (
            500,
            "EngineCore encountered an issue. See stack trace (above) for the root cause.",
            "adapter_load_failed",
            ["EngineCore"],
        ),
        (500, "CUDA out of memory. Tried to allocate 1 GiB.", "adapter_load_failed", ["memory"]),
        (500, "RPC call to add_lora timed out.", "adapter_load_failed", ["timed out"]),
        (500, "Internal Server Error", "adapter_load_failed", ["500"]),
        (500, "", "adapter_load_failed", ["500: Internal Server Error"]),
        (401, "Unauthorized", "adapter_load_failed", ["upstreams[].api_key"]),
        (403, "Forbidden", "adapter_load_failed", ["upstreams[].api_key"]),
        (429, "slow down", "adapter_load_failed", ["slow down"]),
        (502, "bad gateway", "adapter_load_failed", ["502"]),
        (503, "starting", "adapter_load_failed", ["503: starting"]),
        (504, "gateway timeout", "adapter_load_failed", ["504"]),
        (404, "no such tenant", "adapter_load_failed", ["no such tenant"]),
        (302, "elsewhere", "adapter_load_failed", ["302"]),
    ],
)
async def test_load_refused(
    server: FakeServer,
    client: ControlClient,
    *,
    shape: Callable[..., dict[str, Any]],
    status: int,
    message: str,
    code: str,
    named: list[str],
) -> None:
    server.load_answers(status, shape(message, status))
    error = await refused(client.load(SQL))
    assert error.code == code
    for part in named:
        assert part in error.message
    assert "stack trace above" not in error.message
    assert permanent(error) is not error.replayable
    assert len(server.asked) == 1


async def test_load_where_the_path_does_not_exist(client: ControlClient) -> None:
    error = await refused(client.load(SQL))  # FastAPI's own 404, as without the variable
    assert error.code == "runtime_updating_disabled"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in error.message


async def test_load_refused_without_a_reason(server: FakeServer, client: ControlClient) -> None:
    server.load_answers(500, "<html><h1>500</h1></html>")
    assert (await refused(client.load(SQL))).code == "adapter_load_failed"
    server.load_answers(401, {"error": "Unauthorized"})
    assert "api_key" in (await refused(client.load(SQL))).message


# --- unload ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        (200, f"Success: LoRA adapter '{SQL.served}' removed successfully."),
        (404, nested(f"The lora adapter '{SQL.served}' cannot be found.", 404)),
        (404, flat(f"The lora adapter '{SQL.served}' cannot be found.", 404)),
    ],
)
async def test_unload(server: FakeServer, client: ControlClient, answer: Answer) -> None:
    server.answers["/v1/unload_lora_adapter"] = answer
    await client.unload(SQL.served)
    assert server.asked == [("POST", "/v1/unload_lora_adapter", {"lora_name": SQL.served})]


async def test_unload_refused(server: FakeServer, client: ControlClient) -> None:
    assert (await refused(client.unload(SQL.served))).code == "runtime_updating_disabled"
    server.answers["/v1/unload_lora_adapter"] = (500, nested("remove_lora failed", 500))
    error = await refused(client.unload(SQL.served))
    assert error.code == "upstream_invalid"
    assert "remove_lora failed" in error.message


# --- no answer ---------------------------------------------------------------------


@asynccontextmanager
async def speaking(*parts: bytes, then_close: bool = True) -> AsyncIterator[str]:
    """A server that reads a request's head and writes `parts`; its URL."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.writelines(parts)
            await writer.drain()
            if not then_close:
                await done.wait()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        done.set()
        server.close()
        await server.wait_closed()


@pytest.fixture
def closed_url() -> Iterator[str]:
    """A port that is taken, so that nobody else gets it, and that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_nobody_there(closed_url: str, session: aiohttp.ClientSession) -> None:
    client = ControlClient(session, closed_url, timeout=30)
    for call in (client.healthy(), client.models(), client.load(SQL), client.unload("x")):
        error = await refused(call)
        assert error.code == "upstream_connect"
        assert not permanent(error)


async def test_nothing_said(session: aiohttp.ClientSession) -> None:
    async with speaking(then_close=False) as url:
        client = ControlClient(session, url, timeout=0.05)
        assert (await refused(client.models())).code == "upstream_timeout"
        error = await refused(client.load(SQL))
        assert error.code == "adapter_load_timeout"
        assert "'sql'" in error.message
        assert "0.05 s" in error.message
        assert error.replayable
        assert not permanent(error)


async def test_a_load_has_a_time_of_its_own(session: aiohttp.ClientSession) -> None:
    async with speaking(then_close=False) as url:
        client = ControlClient(session, url, timeout=3600, load_timeout=0.05)
        assert "0.05 s" in (await refused(client.load(SQL))).message


async def test_a_body_that_does_not_end(session: aiohttp.ClientSession) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"
    async with speaking(head, then_close=False) as url:
        client = ControlClient(session, url, timeout=0.05)
        assert (await refused(client.models())).code == "upstream_timeout"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"", "upstream_closed"),
        (b"HTTP/1.1 200", "upstream_closed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", "upstream_closed"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "upstream_invalid"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", "upstream_invalid"),
    ],
)
async def test_a_broken_answer(session: aiohttp.ClientSession, said: bytes, code: str) -> None:
    async with speaking(said) as url:
        client = ControlClient(session, url, timeout=30)
        assert (await refused(client.models())).code == code
        error = await refused(client.load(SQL))
        assert error.code == "adapter_load_failed"
        assert error.replayable


# --- adopted -----------------------------------------------------------------------

TINY = Card("tiny", "/m", None, 1024)


def lora(name: str, root: str | None = SQL.path) -> Card:
    return Card(name, root, "tiny")


@pytest.mark.parametrize(
    ("cards", "name"),
    [
        ([], None),
        ([TINY], None),
        ([TINY, lora(SQL.served)], SQL.served),
        ([lora(SQL.served, "/adapters/sql//")], SQL.served),
        ([lora("mine"), lora(SQL.served)], SQL.served),
        ([lora(SQL.served, "/elsewhere")], None),
        ([lora(SQL.served, None)], None),
        ([lora("mine")], "mine"),
        ([lora("mine", "/adapters/x/../sql/")], "mine"),
        ([lora("mine"), lora("sql")], "sql"),
        ([lora("mine"), lora("other")], "mine"),
        ([lora("mine", "/elsewhere")], None),
        ([lora("mine", "adapters/sql")], None),
        ([lora("sql@89abcdef")], None),
        ([lora("someone@89abcdef")], None),
        ([lora("sql@v2")], "sql@v2"),
        ([lora("sql@89ABCDEF")], "sql@89ABCDEF"),
        ([Card("base", SQL.path, None)], None),
        ([lora('a"b'), lora("a\\b"), lora("a\nb"), lora("a\x7fb")], None),
        ([lora("größe")], "größe"),
    ],
)
def test_adopted(cards: list[Card], name: str | None) -> None:
    assert adopted(cards, SQL) == name


# --- parse_error -------------------------------------------------------------------

TRACE = "Traceback (most recent call last):\n  File '/x.py'\nKeyError: 1"


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (400, nested("a reason", 400), "a reason"),
        (400, flat("a reason", 400), "a reason"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (401, {"error": "Unauthorized"}, "Unauthorized"),
        (422, {"detail": [{"loc": ["body"], "msg": "Field required"}]}, "Field required"),
        (422, {"detail": [{"msg": "a"}, {"loc": []}, {"msg": "b"}, "c"]}, "a; b; c"),
        (400, "a bare string", "a bare string"),
        (400, [1, 2], "Bad Request"),
        (400, {"error": None}, "Bad Request"),
        (400, {"error": {"message": None}}, "Bad Request"),
        (400, {"detail": []}, "Bad Request"),
        (400, {"error": {"message": "two\n  lines\x00\x1b[31m"}}, "two lines[31m"),
        (500, nested(DORA, 500), "vLLM does not yet support DoRA"),
        (
            500,
            {"detail": f"it failed\n{TRACE}"},
            "it failed",
        ),
        (
            500,
            {"detail": TRACE},
            "KeyError: 1",
        ),
        (799, {}, "HTTP 799"),
    ],
)
def test_parse_error(status: int, body: object, text: str) -> None:
    assert parse_error(status, json.dumps(body).encode()) == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"upstream connect error", "upstream connect error"),
        (b"  <html>\n<h1>503</h1></html>", "Service Unavailable"),
        (b"", "Service Unavailable"),
        (b"\xff\xfe", "��"),
        (b'{"detail":' + b"[" * 100_000, None),
    ],
)
def test_parse_error_of_plain_text(body: bytes, text: str | None) -> None:
    parsed = parse_error(503, body)
    assert text in (None, parsed)
    assert len(parsed) <= 401


SHAPE = st.sampled_from(
    [b"%s", b'{"error":{"message":"%s"}}', b'{"detail":[{"msg":"%s"}]}', b'{"message":"%s"}']
)


@given(shape=SHAPE, raw=st.binary(max_size=600), status=st.integers(100, 999))
def test_any_error_body_gives_one_short_line(shape: bytes, raw: bytes, status: int) -> None:
    text = parse_error(status, shape % raw)
    assert text
    assert text.isprintable()
    assert len(text) <= 401


# --- permanent ---------------------------------------------------------------------


def test_what_an_upstream_may_yet_get_right_is_not_permanent() -> None:
    for code, known in CODES.items():
        error = ProxyError(code, "")
        assert not (permanent(error) and known.replayable), code
        if known.source == "upstream":
            assert not permanent(error), code
        if code.startswith("adapter_") and known.source == "proxy" and not known.replayable:
            assert permanent(error), code
