"""The upstream transport against real sockets, and its parser shell against any bytes.

The servers here are scripts: a `Peer` reads requests through h11, a strict judge of every
byte that we send, and answers with exactly the bytes that it is told to.
"""

import asyncio
import gc
import hashlib
import os
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import h11
import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_proxy import connection, upstream
from lora_proxy.connection import Connection, Head, Limits
from lora_proxy.errors import ProxyError
from lora_proxy.types import Headers
from lora_proxy.upstream import BUFFER_HIGH, Pool, Response, request_head

LOOPS = ("asyncio", "uvloop")  # conftest.py runs every async test of this module on both

PATIENCE = 30  # seconds after which a test fails rather than waits
ONE_READ = 256 * 1024  # bytes; neither loop reads more at once
HI = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
YO = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nyo"


# --- the servers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What h11 made of the bytes that we sent."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Peer:
    """The server's end of one connection, in the hands of a script."""

    def __init__(
        self, server: "Server", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self._judge = h11.Connection(h11.SERVER)

    async def head(self) -> h11.Request:
        """The next request's head, and not a byte more than has come with it."""
        assert self._judge.trailing_data[0] == b"", "a request was sent before the last answer"
        self._judge = h11.Connection(h11.SERVER)
        event = await self._event()
        if isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError
        assert isinstance(event, h11.Request)
        return event

    async def request(self) -> Request:
        """The next request, whole."""
        head = await self.head()
        body = b""
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        request = Request(head.method, head.target, list(head.headers), body)
        self.server.requests.append(request)
        return request

    async def send(self, *pieces: bytes) -> None:
        """Writes the pieces, letting the client read between them."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def gone(self) -> bytes:
        """Waits until the client has closed; what it sent meanwhile."""
        received = b""
        with suppress(ConnectionError):
            while data := await self.reader.read(ONE_READ):
                received = (received + data)[-ONE_READ:]
        self.writer.transport.abort()
        return received

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Closes with RST."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def _event(self) -> h11.Event:
        while (event := self._judge.next_event()) is h11.NEED_DATA:
            self._judge.receive_data(await self.reader.read(ONE_READ))
        assert not isinstance(event, type), event  # h11.PAUSED: more than one request at once
        return event


Script = Callable[[Peer], Coroutine[Any, Any, object]]


class Server:
    """Plays one script a connection, in the order of their coming; the last one repeats."""

    def __init__(self, *scripts: Script) -> None:
        self.peers: list[Peer] = []
        self.requests: list[Request] = []
        self._scripts = scripts
        self._tasks: list[asyncio.Task[object]] = []
        self._pools: list[Pool] = []
        self._listener: asyncio.Server

    async def start(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self._listener = await asyncio.start_server(self._accept, host, 0, ssl=tls)
        self.port: int = self._listener.sockets[0].getsockname()[1]

    def pool(
        self,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> Pool:
        url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self._pools.append(Pool("gpu-0", url, limits or Limits(), tls))
        return self._pools[-1]

    async def joined(self) -> None:
        """Waits for the scripts under way: whatever failed in them fails the test."""
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        for pool in self._pools:
            pool.close()
            assert not pool.connections
            assert not pool.idle
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self.peers:
            peer.writer.transport.abort()
        for _ in range(5):
            await asyncio.sleep(0)  # connection_lost of both ends; TLS takes a few turns
        assert [x for x in results if isinstance(x, Exception)] == []

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer)
        script = self._scripts[min(len(self.peers), len(self._scripts) - 1)]
        self.peers.append(peer)
        self._tasks.append(asyncio.get_running_loop().create_task(script(peer)))


def answering(*answers: bytes | tuple[bytes, ...], then: str = "keep") -> Script:
    """A script: one answer a request, then `keep` the connection, `close` or `reset` it."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            await peer.send(*([answer] if isinstance(answer, bytes) else answer))
        match then:
            case "close":
                peer.close()
            case "reset":
                peer.reset()
            case _:
                assert await peer.gone() == b""

    return script


async def closing_on_request(peer: Peer) -> None:
    """A script: closes as soon as a request is there."""
    await peer.request()
    peer.close()


async def silent(peer: Peer) -> None:
    """A script: takes a request, never answers, and waits for the client to go."""
    await peer.request()
    await peer.gone()


async def echo(peer: Peer) -> None:
    """A script: every request's target is its answer, until the client goes."""
    with suppress(h11.RemoteProtocolError, ConnectionError):
        while True:
            request = await peer.request()
            await peer.send(answer(request.target))


def answer(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    """A well-formed answer with a content-length."""
    lines = (b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *fields, b"", body)
    return b"\r\n".join(lines)


Serve = Callable[..., Awaitable[Server]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers; at the end nothing may have gone wrong behind the test's back."""
    servers: list[Server] = []
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))

    async def start(
        *scripts: Script, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> Server:
        server = Server(*scripts)
        await server.start(host, tls)
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.stop()
    assert faults == []


# --- the client ----------------------------------------------------------------------------


async def ask(
    pool: Pool, target: bytes = b"/", method: bytes = b"GET", body: bytes = b""
) -> Response:
    """One request, its head awaited."""
    headers = [(b"host", pool.authority)]
    if body:
        headers.append((b"content-length", b"%d" % len(body)))
    async with asyncio.timeout(PATIENCE):
        return await pool.request(method, target, headers, body)


async def rest(response: Response) -> bytes:
    """All of the body that is still to be read."""
    async with asyncio.timeout(PATIENCE):
        body = await response.read_all(1 << 40)
    assert body is not None
    assert response.complete
    response.close()
    return body


async def fetch(pool: Pool, target: bytes = b"/", method: bytes = b"GET") -> bytes:
    """One request's whole body."""
    return await rest(await ask(pool, target, method))


async def refused(awaitable: Awaitable[object], code: str, match: str = ".") -> ProxyError:
    """The `ProxyError` that comes of it."""
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ProxyError, match=match) as caught:
            await awaitable
    assert caught.value.code == code
    return caught.value


async def until(condition: Callable[[], object]) -> None:
    """Lets the loop turn until it is so."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # no event tells of another object's state
            await asyncio.sleep(0)


def out_of_patience(connection: Connection) -> bool:
    """Lets the silence timer go off now; whether that was the end."""
    assert connection._timer is not None
    connection._timer.cancel()
    connection._check_silence()
    return connection._timer is None


# --- framing -------------------------------------------------------------------------------

CHUNKED = (
    b"HTTP/1.1 100 Continue\r\nx-early: 1\r\n\r\n"
    b"HTTP/1.1 201 Created Here\r\nTransfer-Encoding: chunked\r\nX-Empty:\r\nx-a: b\r\n\r\n"
    b"3;ext=1\r\nabc\r\nA\r\n0123456789\r\n0\r\nx-trailer: t\r\n\r\n"
)
LENGTH = (
    b"HTTP/1.1 201 Created Here\r\nContent-Length: 13\r\nX-Empty:\r\nx-a: b\r\n\r\nabc0123456789"
)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> asyncio.Semaphore:
    """Released once for every read of the client's sockets."""
    counter = asyncio.Semaphore(0)

    class Watched(Connection):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            counter.release()

    monkeypatch.setattr(upstream, "Connection", Watched)
    return counter


@pytest.mark.parametrize(
    ("wire", "cut"),
    [(wire, cut) for wire in (CHUNKED, LENGTH) for cut in range(1, len(wire))],
    ids=lambda value: value if isinstance(value, int) else value[9:12].decode(),
)
async def test_an_answer_read_in_two_pieces(
    serve: Serve, reads: asyncio.Semaphore, wire: bytes, cut: int
) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            await peer.send(wire[:cut])
            async with asyncio.timeout(PATIENCE):
                await reads.acquire()
            await peer.send(wire[cut:])
            async with asyncio.timeout(PATIENCE):
                await reads.acquire()
        await peer.gone()

    server = await serve(script)
    pool = server.pool()
    for _ in range(2):
        response = await ask(pool)
        framing = (b"Transfer-Encoding", b"chunked")
        if wire is LENGTH:
            framing = (b"Content-Length", b"13")
        assert response.status == 201
        assert response.reason == b"Created Here"
        assert response.headers == [framing, (b"X-Empty", b""), (b"x-a", b"b")]
        assert await rest(response) == b"abc0123456789"
    assert len(server.peers) == 1


async def test_a_request_arrives_as_it_was_given(serve: Serve) -> None:
    server = await serve(answering(HI, HI))
    pool = server.pool()
    large = b"x" * 100_000  # above COALESCE_BELOW
    for body in (b'{"model":"sql"}', large):
        assert await rest(await ask(pool, b"/v1/x?y=%20", b"POST", body)) == b"hi"
    small, big = server.requests
    assert (small.method, small.target, small.body) == (b"POST", b"/v1/x?y=%20", b'{"model":"sql"}')
    assert small.headers == [(b"host", pool.authority), (b"content-length", b"15")]
    assert big.body == large


def test_request_head() -> None:
    head = request_head(b"POST", b"/a?b", [(b"Host", b"h:1"), (b"x", b"")])
    assert head == b"POST /a?b HTTP/1.1\r\nHost: h:1\r\nx: \r\n\r\n"


async def test_without_a_length_the_close_ends_the_body(serve: Serve) -> None:
    wire = (b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n", b"one ", b"two")
    server = await serve(answering(wire, then="close"))
    pool = server.pool()
    for _ in range(2):
        assert await fetch(pool) == b"one two"
    assert len(server.peers) == 2


@pytest.mark.parametrize(
    "framing", [b"content-length: 5\r\n", b"", b"transfer-encoding: chunked\r\n"]
)
async def test_head_has_no_body_whatever_it_announces(serve: Serve, framing: bytes) -> None:
    server = await serve(answering(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n"))
    pool = server.pool()
    for count in (1, 2):
        assert await fetch(pool, method=b"HEAD") == b""
        assert not pool.connections  # the parser would wait for the body
        assert len(server.peers) == count


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 1234\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_empty_answers_keep_the_connection(serve: Serve, head: bytes) -> None:
    server = await serve(answering(head, HI))
    pool = server.pool()
    response = await ask(pool)
    assert response.status == int(head[9:12])
    assert await rest(response) == b""
    assert await fetch(pool) == b"hi"
    assert len(server.peers) == 1


async def test_interim_answers_are_skipped(serve: Serve) -> None:
    interim = (
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\nx: 1\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n",
    )
    final = b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nhi"  # and no reason phrase
    server = await serve(answering((*interim, final), b"".join(interim) + final))
    pool = server.pool()
    for _ in range(2):
        response = await ask(pool)
        assert (response.status, response.reason) == (200, b"")
        assert response.headers == [(b"content-length", b"2")]
        assert await rest(response) == b"hi"
    assert len(server.peers) == 1


async def test_trailers_are_dropped_and_do_not_leak_into_the_next_answer(serve: Serve) -> None:
    trailed = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\na: 1\r\nb: 2\r\n\r\n"
    )
    server = await serve(answering(trailed, HI))
    pool = server.pool()
    first = await ask(pool)
    assert await rest(first) == b"hi"
    assert first.headers == [(b"transfer-encoding", b"chunked")]
    second = await ask(pool)
    assert second.headers == [(b"content-length", b"2")]
    assert await rest(second) == b"hi"
    assert len(server.peers) == 1


@pytest.mark.parametrize(
    ("wire", "body", "kept"),
    [
        (answer(b"hi"), b"hi", True),
        (answer(b"hi", b"connection: close"), b"hi", False),
        (answer(b"hi", b"Connection: x, Close"), b"hi", False),
        (b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n", b"", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", b"hi", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nhi", b"hi", True),
        (
            answer(b"hi", b"connection: upgrade", b"upgrade: h2c"),
            b"hi",
            True,
        ),
    ],
)
async def test_a_connection_is_kept_only_where_the_answer_allows(
    serve: Serve, wire: bytes, body: bytes, *, kept: bool
) -> None:
    server = await serve(answering(wire, wire) if kept else answering(wire))
    pool = server.pool()
    assert await fetch(pool) == body
    assert len(pool.idle) == len(pool.connections) == kept
    assert await fetch(pool) == body
    assert len(server.peers) == (1 if kept else 2)


async def test_http_1_0_answer_ended_by_the_close(serve: Serve) -> None:
    server = await serve(answering((b"HTTP/1.0 200 OK\r\n\r\n", b"h", b"i"), then="close"))
    assert await fetch(server.pool()) == b"hi"


async def test_an_answer_to_a_request_that_is_still_being_sent(serve: Serve) -> None:
    async def too_large(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer(b"no", status=b"413 Content Too Large"))
        await peer.gone()

    server = await serve(too_large)
    pool = server.pool()
    response = await ask(pool, method=b"POST", body=bytes(64 << 20))
    assert response.status == 413
    assert await rest(response) == b"no"
    assert not pool.connections
    await server.joined()


# --- bytes that nobody asked for -----------------------------------------------------------


@pytest.mark.parametrize(
    "surplus",
    [
        YO,
        YO[:9],
        b"rubbish",
        b"\x00",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ],
)
@pytest.mark.parametrize("wire", [HI, answer(b"hi", b"connection: close"), CHUNKED])
async def test_what_follows_an_answer_is_never_given_to_the_next_request(
    serve: Serve, wire: bytes, surplus: bytes
) -> None:
    server = await serve(answering(wire + surplus), answering(answer(b"mine")))
    pool = server.pool()
    assert await fetch(pool) == (b"abc0123456789" if wire is CHUNKED else b"hi")
    assert not pool.connections
    assert await fetch(pool) == b"mine"
    assert len(server.peers) == 2


async def test_what_follows_an_answer_to_head_is_not_an_error(serve: Serve) -> None:
    server = await serve(answering(HI))
    assert await fetch(server.pool(), method=b"HEAD") == b""


async def test_bytes_on_an_idle_connection_close_it(serve: Serve) -> None:
    server = await serve(answering(HI), answering(answer(b"mine")))
    pool = server.pool()
    assert await fetch(pool) == b"hi"
    assert pool.idle
    await server.peers[0].send(YO)
    await until(lambda: not pool.connections)
    assert await fetch(pool) == b"mine"


def beneath(peer: Peer) -> socket.socket:
    """The server's socket, without the loop between."""
    return socket.socket(fileno=os.dup(peer.writer.get_extra_info("socket").fileno()))


async def test_bytes_that_the_loop_has_not_read_yet_spoil_an_idle_connection(serve: Serve) -> None:
    server = await serve(answering(HI), answering(answer(b"mine")))
    pool = server.pool()
    assert await fetch(pool) == b"hi"
    with beneath(server.peers[0]) as theirs:
        theirs.send(YO)  # no turn of the loop between this and the next request
    assert await fetch(pool) == b"mine"
    assert len(server.peers) == 2


# --- reuse and staleness -------------------------------------------------------------------


async def test_the_connection_used_last_is_taken_first(serve: Serve) -> None:
    server = await serve(echo)
    pool = server.pool()
    first, second = await asyncio.gather(ask(pool, b"/1"), ask(pool, b"/2"))
    assert (await rest(first), await rest(second)) == (b"/1", b"/2")
    oldest, newest = pool.idle
    assert pool.take_idle() is newest
    assert pool.take_idle() is oldest
    assert pool.take_idle() is None
    newest.abort()
    oldest.abort()


async def test_a_connection_idle_for_too_long_is_closed_and_not_used(serve: Serve) -> None:
    server = await serve(answering(HI))
    pool = server.pool(Limits(keepalive=0))
    assert await fetch(pool) == b"hi"
    assert await fetch(pool) == b"hi"
    assert len(server.peers) == 2
    assert len(pool.connections) == 1


async def test_one_closing_connection_does_not_cost_the_others(serve: Serve) -> None:
    server = await serve(echo)
    pool = server.pool()
    for response in await asyncio.gather(*(ask(pool) for _ in range(3))):
        await rest(response)
    oldest, middle, newest = pool.idle
    newest._transport.abort()  # type: ignore[union-attr]  # connected, as it is idle
    assert pool.take_idle() is middle
    assert list(pool.idle) == [oldest]
    middle.abort()


async def test_a_connection_closed_while_idle_is_not_used(serve: Serve) -> None:
    server = await serve(answering(HI, then="close"))
    pool = server.pool()
    for _ in range(2):
        assert await fetch(pool) == b"hi"
        await until(lambda: not pool.connections)
    assert len(server.peers) == len(server.requests) == 2


async def test_a_close_that_the_loop_has_not_seen_yet_is_not_run_into(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HI)

    server = await serve(script)
    pool = server.pool()
    assert await fetch(pool) == b"hi"
    with beneath(server.peers[0]) as theirs:
        theirs.shutdown(socket.SHUT_WR)  # no turn of the loop between this and the next request
    assert await fetch(pool) == b"hi"
    assert len(server.requests) == 2  # nothing was sent twice


def second_request(fate: Script) -> Script:
    """A script: a good answer first, then `fate`."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HI)
        await fate(peer)

    return script


async def resetting_on_request(peer: Peer) -> None:
    await peer.request()
    peer.reset()


@pytest.mark.parametrize("fate", [closing_on_request, resetting_on_request])
async def test_a_stale_connection_is_replaced_once(serve: Serve, fate: Script) -> None:
    server = await serve(second_request(fate), answering(YO))
    pool = server.pool()
    assert await fetch(pool, b"/1") == b"hi"
    assert await rest(await ask(pool, b"/2", b"POST", b"body")) == b"yo"
    assert [x.target for x in server.requests] == [b"/1", b"/2", b"/2"]
    assert server.requests[1] == server.requests[2]


async def test_a_stale_connection_is_not_replaced_twice(serve: Serve) -> None:
    server = await serve(second_request(closing_on_request), closing_on_request)
    pool = server.pool()
    assert await fetch(pool) == b"hi"
    error = await refused(ask(pool), "upstream_closed", "before its headers")
    assert not error.replayable
    assert len(server.peers) == 2
    assert len(server.requests) == 3
    assert not pool.connections


async def test_a_connection_that_dies_late_was_not_stale(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALE_WINDOW", 0)
    server = await serve(second_request(closing_on_request), answering(YO))
    pool = server.pool()
    assert await fetch(pool) == b"hi"
    assert not (await refused(ask(pool), "upstream_closed")).replayable
    assert len(server.requests) == 2


@pytest.mark.parametrize("sign", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", HI[:-3]])
async def test_a_connection_that_began_to_answer_was_not_stale(serve: Serve, sign: bytes) -> None:
    async def fate(peer: Peer) -> None:
        await peer.request()
        await peer.send(sign)
        peer.close()

    server = await serve(second_request(fate), answering(YO))
    pool = server.pool()
    assert await fetch(pool) == b"hi"
    assert not (await refused(ask(pool), "upstream_closed")).replayable
    assert len(server.requests) == 2


@pytest.mark.parametrize("script", [closing_on_request, resetting_on_request])
async def test_a_fresh_connection_is_never_stale(serve: Serve, script: Script) -> None:
    server = await serve(script)
    error = await refused(ask(server.pool()), "upstream_closed", "before its headers")
    assert not error.replayable
    assert len(server.requests) == 1


async def test_a_timeout_is_not_staleness(serve: Serve) -> None:
    server = await serve(second_request(silent), answering(YO))
    pool = server.pool()
    assert await fetch(pool) == b"hi"
    (connection,) = pool.idle
    asking = asyncio.ensure_future(ask(pool))
    await until(lambda: len(server.requests) == 2)
    connection._last_activity -= 1000  # seconds
    assert out_of_patience(connection)
    assert not (await refused(asking, "upstream_timeout")).replayable
    await server.joined()
    assert len(server.requests) == 2


# --- answers that are not HTTP -------------------------------------------------------------

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"\x15\x03\x03\x00\x02\x02\x46", id="TLS"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="SSH"),
        pytest.param(b"HTTP/1.1 2OO OK\r\n\r\n", id="status"),
        pytest.param(b"HTTP/1.1 000 OK\r\ncontent-length: 2\r\n\r\nhi", id="status 0"),
        pytest.param(b"HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\nhi", id="status 99"),
        pytest.param(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", id="colon"),
        pytest.param(b"HTTP/1.1 200 OK\r\na : b\r\n\r\n", id="space before colon"),
        pytest.param(b"HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n", id="folding"),
        pytest.param(b"HTTP/1.1 200 OK\r\na: b\0c\r\n\r\n", id="NUL"),
        pytest.param(b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", id="bare LF"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nhi", id="negative length"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nhi", id="list of lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 9" + b"9" * 20 + b"\r\n\r\n", id="huge"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi", id="two lengths"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
            b"2\r\nhi\r\n0\r\n\r\n",
            id="length and chunked",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n"
            b"2\r\nhi\r\n0\r\n\r\n",
            id="chunked and length",
        ),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", id="101"),
        pytest.param(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhi",
            id="101 with upgrade",
        ),
    ],
)
async def test_a_head_that_is_not_http(serve: Serve, wire: bytes) -> None:
    server = await serve(answering(wire))
    pool = server.pool()
    assert not (await refused(ask(pool), "upstream_invalid", "gpu-0")).replayable
    assert not pool.connections
    await server.joined()


async def test_an_unasked_101_says_so(serve: Serve) -> None:
    server = await serve(answering(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"))
    await refused(ask(server.pool()), "upstream_invalid", "101 was not asked for")


@pytest.mark.parametrize("fault", [b"zz\r\n", b"-1\r\n", b"2\r\nhiX", b"11111111111111111\r\n"])
async def test_what_came_before_a_bad_chunk_is_read_first(serve: Serve, fault: bytes) -> None:
    server = await serve(answering((CHUNKED_HEAD, b"4\r\ngood\r\n" + fault)))
    response = await ask(server.pool())
    body = await response.read()
    while len(body) < len(b"good"):
        body += await response.read()
    assert body.startswith(b"good")
    await refused(response.read_all(100), "upstream_invalid")
    response.close()
    await server.joined()


@pytest.mark.parametrize(
    ("start", "more"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nx: ", b"a" * 4096, id="one line"),
        pytest.param(b"HTTP/1.1 200 ", b"a" * 4096, id="reason"),
        pytest.param(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 500, id="fields"),
        pytest.param(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, id="interim"),
        pytest.param(CHUNKED_HEAD + b"2\r\nhi\r\n0\r\nx: ", b"a" * 4096, id="trailer"),
        pytest.param(CHUNKED_HEAD + b"2\r\nhi\r\n0\r\n", b"a: b\r\n" * 500, id="trailers"),
        pytest.param(CHUNKED_HEAD + b"2\r\nhi\r\n2;x=", b"a" * 4096, id="chunk extension"),
    ],
)
async def test_endless_heads_are_cut_off(serve: Serve, start: bytes, more: bytes) -> None:
    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.send(start)
        with suppress(ConnectionError):
            while not peer.writer.transport.is_closing():
                await peer.send(more)

    async def ask_and_read() -> None:
        response = await ask(pool)
        try:
            await rest(response)
        finally:
            response.close()

    server = await serve(endless)
    pool = server.pool(Limits(headers=20_000))
    await refused(ask_and_read(), "upstream_invalid", "exceed 20000 bytes")
    assert not pool.connections
    await server.joined()


async def test_a_long_answer_of_small_chunks_is_not_a_long_head(serve: Serve) -> None:
    chunks = (b"1\r\n", b"x\r\n") * 200
    server = await serve(answering((CHUNKED_HEAD, *chunks, b"0\r\n\r\n")))
    assert await fetch(server.pool(Limits(headers=100))) == b"x" * 200


async def test_a_head_within_the_limit_with_a_large_body_is_fine(serve: Serve) -> None:
    server = await serve(answering(answer(bytes(1 << 20), b"x: " + b"a" * 900)))
    assert await fetch(server.pool(Limits(headers=1000))) == bytes(1 << 20)


# --- answers that break off ----------------------------------------------------------------


@pytest.mark.parametrize("how", [Peer.close, Peer.reset])
@pytest.mark.parametrize("wire", [b"H", HI[:20], HI[:-3], b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_broken_off_in_its_head(
    serve: Serve, wire: bytes, how: Callable[[Peer], None]
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(wire)
        how(peer)

    server = await serve(script)
    pool = server.pool()
    await refused(ask(pool), "upstream_closed", "before its headers")
    assert not pool.connections


@pytest.mark.parametrize("how", [Peer.close, Peer.reset])
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", id="length"),
        pytest.param(CHUNKED_HEAD + b"9\r\n", id="in a chunk"),
        pytest.param(CHUNKED_HEAD + b"1\r\na\r\n7\r\n", id="in a later chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", id="until close"),
    ],
)
async def test_broken_off_in_its_body(
    serve: Serve, head: bytes, how: Callable[[Peer], None]
) -> None:
    seen = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head + b"part")
        await seen.wait()
        how(peer)

    server = await serve(script)
    pool = server.pool()
    response = await ask(pool)
    async with asyncio.timeout(PATIENCE):
        body = await response.read()
    assert body in (b"part", b"apart")
    seen.set()
    if head == b"HTTP/1.1 200 OK\r\n\r\n" and how is Peer.close:
        assert await rest(response) == b""  # no telling it from the end
    else:
        await refused(response.read(), "upstream_closed", "before its body was complete")
        await refused(response.read(), "upstream_closed")  # and again, as often as one asks
    assert not pool.connections


async def test_broken_off_between_chunks(serve: Serve) -> None:
    server = await serve(answering(CHUNKED_HEAD + b"2\r\nhi\r\n", then="close"))
    response = await ask(server.pool())
    assert await response.read() == b"hi"
    await refused(response.read(), "upstream_closed")


# --- time ----------------------------------------------------------------------------------


async def test_no_connection_in_time() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        pool = Pool("gpu-0", f"http://127.0.0.1:{full.getsockname()[1]}", Limits(connect=0.05))
        error = await refused(ask(pool), "upstream_connect", "no connection within 0.05 s")
        assert error.replayable
        assert not pool.connections
        for filler in fillers:
            filler.close()


async def test_no_tls_in_time(serve: Serve, authority: trustme.CA) -> None:
    server = await serve(Peer.gone)  # takes the connection, says nothing
    pool = server.pool(Limits(connect=0.05), tls=trusting(authority))
    await refused(ask(pool), "upstream_connect", "no connection within 0.05 s")
    assert not pool.connections
    await server.joined()


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses, and nobody else gets it
        pool = Pool("gpu-0", f"http://127.0.0.1:{taken.getsockname()[1]}", Limits())
        assert (await refused(ask(pool), "upstream_connect", "gpu-0 cannot be")).replayable


async def test_no_such_host() -> None:
    await refused(ask(Pool("gpu-0", "http://gpu-0.invalid:80", Limits())), "upstream_connect")


async def test_never_answered(serve: Serve) -> None:
    server = await serve(Peer.gone)
    pool = server.pool(Limits(read=0.05))
    error = await refused(ask(pool), "upstream_timeout", "nothing for 0.05 s")
    assert not error.replayable
    assert not pool.connections
    await server.joined()


async def test_silence_counts_from_the_last_byte() -> None:
    with FakeTransport() as wire:
        response = Response(wire.connection)
        wire.connection.send(response, b"GET", b"", b"")
        wire.connection._last_activity -= 1000  # seconds
        wire.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\npart")
        assert not out_of_patience(wire.connection)
        wire.connection._last_activity -= 1000
        assert out_of_patience(wire.connection)
        assert wire.aborted
        assert await response.read() == b"part"
        await refused(response.read(), "upstream_timeout", "nothing for 600 s")


async def test_silence_counts_from_the_end_of_a_pause() -> None:
    with FakeTransport() as wire:
        response = Response(wire.connection)
        wire.connection.send(response, b"GET", b"", b"")
        wire.feed(CHUNKED_HEAD + b"%x\r\n" % (BUFFER_HIGH + 1) + bytes(BUFFER_HIGH + 1))
        wire.connection._last_activity -= 1000  # seconds
        await response.read()
        assert not out_of_patience(wire.connection)
        wire.connection._last_activity -= 1000
        assert out_of_patience(wire.connection)


async def test_silence_while_our_reader_pauses_is_not_the_upstreams() -> None:
    with FakeTransport(Limits(read=0.005)) as wire:
        response = Response(wire.connection)
        wire.connection.send(response, b"GET", b"", b"")
        wire.feed(CHUNKED_HEAD + b"%x\r\n" % BUFFER_HIGH + bytes(BUFFER_HIGH) + b"\r\n1\r\nx\r\n")
        assert wire.paused
        for _ in range(5):  # the timer goes off, and is armed again, and again
            armed = wire.connection._timer
            await until(lambda armed=armed: wire.connection._timer is not armed)
            assert not wire.aborted
        assert len(await response.read()) == BUFFER_HIGH + 1
        assert not wire.paused
        await refused(response.read(), "upstream_timeout")


# --- backpressure --------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_a_reader_that_does_not_read_stops_the_server(
    serve: Serve, authority: trustme.CA, framing: str, *, secure: bool
) -> None:
    block = bytes(range(256)) * 4096  # 1 MiB
    blocks = 50
    sent = 0

    async def fast(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        match framing:
            case "length":
                await peer.send(
                    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(block) * 50)
                )
            case "chunked":
                await peer.send(CHUNKED_HEAD)
            case _:
                await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(blocks):
            await peer.send(b"100000\r\n" + block + b"\r\n" if framing == "chunked" else block)
            sent += 1
        if framing == "chunked":
            await peer.send(b"0\r\n\r\n")
        if framing == "close":
            peer.close()
        else:
            await peer.gone()

    server = await serve(fast, tls=serving(authority, "127.0.0.1") if secure else None)
    pool = server.pool(tls=trusting(authority) if secure else None)
    response = await ask(pool)
    (connection,) = pool.connections
    await until(lambda: connection._paused)
    held = response._size
    assert BUFFER_HIGH < held <= BUFFER_HIGH + ONE_READ
    for _ in range(200):
        await asyncio.sleep(0)
    assert response._size == held
    assert sent < blocks
    digest = hashlib.sha256()
    async with asyncio.timeout(PATIENCE):
        while data := await response.read():
            digest.update(data)
            assert response._size <= BUFFER_HIGH + ONE_READ
    assert digest.digest() == hashlib.sha256(block * blocks).digest()
    assert len(pool.idle) == (framing != "close")


async def test_read_all_stops_at_its_limit_and_loses_nothing(serve: Serve) -> None:
    body = bytes(range(256)) * 8192  # 2 MiB
    server = await serve(answering(answer(body), answer(body)))
    pool = server.pool()
    response = await ask(pool)
    async with asyncio.timeout(PATIENCE):
        assert await response.read_all(len(body) // 2) is None
        assert await response.read_all(len(body) - 1) is None
        assert await response.read_all(len(body)) == body
        assert await response.read_all(0) == b""
    response.close()
    response = await ask(pool)
    async with asyncio.timeout(PATIENCE):
        first = await response.read()
        assert await response.read_all(0) is None
    assert first + await rest(response) == body
    assert len(server.peers) == 1


# --- leaving early -------------------------------------------------------------------------


@pytest.fixture
def spotless() -> Iterator[None]:
    """What is left to the garbage collector complains before the test is over."""
    yield
    gc.collect()  # a ResourceWarning or a lost exception is an error in pytest's hands


async def cancel(task: "asyncio.Future[object]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_connecting(
    serve: Serve, authority: trustme.CA, spotless: None
) -> None:
    server = await serve(Peer.gone)
    pool = server.pool(tls=trusting(authority))
    asking = asyncio.ensure_future(ask(pool))
    await until(lambda: server.peers)
    await cancel(asking)
    await server.joined()  # the server saw us go
    assert not pool.connections


@pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])
async def test_cancelled_at_any_turn_of_the_loop(
    serve: Serve, authority: trustme.CA, spotless: None, *, secure: bool
) -> None:
    server = await serve(echo, tls=serving(authority, "127.0.0.1") if secure else None)
    tls = trusting(authority) if secure else None
    turns, done = 0, False
    while not done:
        pool = server.pool(tls=tls)
        asking = asyncio.ensure_future(ask(pool))
        for _ in range(turns):
            await asyncio.sleep(0)
        done = asking.done()
        if done:
            assert await rest(await asking) == b"/"
        else:
            await cancel(asking)
        assert pool.connections == set(pool.idle)  # nothing but what can be used again
        pool.close()
        turns += 1
    assert turns > 3
    await server.joined()


async def test_cancelled_while_waiting_for_the_head(serve: Serve, spotless: None) -> None:
    server = await serve(silent)
    pool = server.pool()
    asking = asyncio.ensure_future(ask(pool))
    await until(lambda: server.requests)
    await cancel(asking)
    assert not pool.connections
    await server.joined()


async def test_cancelled_while_reading(serve: Serve, spotless: None) -> None:
    server = await serve(answering(CHUNKED_HEAD + b"2\r\nhi\r\n"))
    pool = server.pool()
    response = await ask(pool)
    assert await response.read() == b"hi"
    reading = asyncio.ensure_future(response.read())
    await asyncio.sleep(0)
    await cancel(reading)
    assert pool.connections  # it is close() that ends it
    response.close()
    response.close()
    assert not pool.connections
    await server.joined()


async def test_closing_a_complete_answer_keeps_the_connection(serve: Serve) -> None:
    server = await serve(answering(HI, YO))
    pool = server.pool()
    response = await ask(pool)
    await until(lambda: response.complete)
    following = await ask(pool)
    response.close()  # long done; the connection is the other's by now
    assert await rest(following) == b"yo"
    assert await rest(response) == b"hi"


async def test_a_closed_pool(serve: Serve, spotless: None) -> None:
    server = await serve(answering(HI), answering(CHUNKED_HEAD + b"2\r\nyo\r\n"), silent)
    pool = server.pool()
    idle = await ask(pool)
    idle_connection = next(iter(pool.connections))
    await until(lambda: idle.complete)
    assert pool.take_idle() is idle_connection  # out of the way, so that a second is made
    streaming = await ask(pool)
    assert await streaming.read() == b"yo"
    waiting = asyncio.ensure_future(ask(pool))
    await until(lambda: len(server.requests) == 3)
    pool.idle[idle_connection] = None
    pool.close()
    pool.close()
    assert not pool.connections
    assert not pool.idle
    assert await rest(idle) == b"hi"
    await refused(streaming.read(), "upstream_closed", "stopped using")
    await refused(waiting, "upstream_closed", "stopped using")
    await refused(ask(pool), "upstream_connect", "shutting down")
    await server.joined()
    assert len(server.peers) == 3


async def test_a_pool_closed_while_connecting(serve: Serve, spotless: None) -> None:
    server = await serve(Peer.gone)
    pool = server.pool()
    asking = asyncio.ensure_future(ask(pool))
    await asyncio.sleep(0)
    pool.close()
    await refused(asking, "upstream_connect", "shutting down")
    assert not pool.connections
    await server.joined()


# --- TLS -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def serving(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_tls(serve: Serve, authority: trustme.CA, host: str) -> None:
    server = await serve(answering(HI, CHUNKED), host=host, tls=serving(authority, host))
    pool = server.pool(tls=trusting(authority), host=f"[{host}]" if ":" in host else host)
    assert await fetch(pool) == b"hi"
    assert await fetch(pool) == b"abc0123456789"
    assert len(server.peers) == 1


async def test_tls_of_an_unknown_authority(serve: Serve, authority: trustme.CA) -> None:
    server = await serve(Peer.gone, tls=serving(authority, "127.0.0.1"))
    pool = server.pool(tls=ssl.create_default_context())
    await refused(ask(pool), "upstream_connect", "TLS failed.*local issuer certificate")
    assert not pool.connections


async def test_tls_of_another_host(serve: Serve, authority: trustme.CA) -> None:
    server = await serve(Peer.gone, tls=serving(authority, "elsewhere.example"))
    pool = server.pool(tls=trusting(authority))
    await refused(ask(pool), "upstream_connect", "TLS failed.*127.0.0.1")
    assert not pool.connections


async def test_tls_to_a_plain_server(serve: Serve, authority: trustme.CA) -> None:
    async def plain(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.gone()

    server = await serve(plain)
    await refused(ask(server.pool(tls=trusting(authority))), "upstream_connect", "TLS failed")


async def test_tls_server_that_hangs_up(serve: Serve, authority: trustme.CA) -> None:
    async def hang_up(peer: Peer) -> None:
        await peer.reader.read(1)
        peer.close()

    server = await serve(hang_up)
    error = await refused(ask(server.pool(tls=trusting(authority))), "upstream_connect")
    assert "()" not in error.message


def test_the_parts_of_a_url() -> None:
    six = Pool("gpu-0", "http://[::1]:8000", Limits())
    assert (six.host, six.port, six.authority) == ("::1", 8000, b"[::1]:8000")
    plain = Pool("gpu-0", "http://gpu", Limits())
    assert (plain.host, plain.port, plain.authority) == ("gpu", 80, b"gpu")
    assert Pool("gpu-0", "https://gpu", Limits()).port == 443


async def test_ipv6(serve: Serve) -> None:
    server = await serve(answering(HI), host="::1")
    assert await fetch(server.pool(host="[::1]")) == b"hi"


# --- many ----------------------------------------------------------------------------------


async def test_concurrent_requests_each_get_their_own_answer(serve: Serve) -> None:
    count = 200
    everyone = asyncio.Event()

    async def script(peer: Peer) -> None:
        for _ in range(2):
            request = await peer.request()
            if len(peer.server.requests) % count == 0:
                everyone.set()
            await everyone.wait()
            await peer.send(answer(request.target)[:-1], request.target[-1:])
        await peer.gone()

    server = await serve(script)
    pool = server.pool()
    for turn in (1, 2):
        everyone.clear()
        targets = [b"/%d/%d" % (turn, number) for number in range(count)]
        assert await asyncio.gather(*(fetch(pool, target) for target in targets)) == targets
        assert len(pool.idle) == len(pool.connections) == len(server.peers) == count


async def test_a_thousand_requests_leave_nothing_behind(serve: Serve) -> None:
    async def script(peer: Peer) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await peer.reader.readuntil(b"\r\n\r\n"):
                peer.writer.write(CHUNKED)

    async def fetch_plainly() -> None:  # without timeouts, which leave timers of their own
        response = await pool.request(b"GET", b"/", [(b"host", b"gpu-0")])
        assert await response.read_all(100) == b"abc0123456789"
        response.close()

    server = await serve(script)
    pool = server.pool()
    await fetch_plainly()
    (connection,) = pool.idle
    timer = connection._timer
    for _ in range(100):
        await fetch_plainly()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(900):
        await fetch_plainly()
    gc.collect()
    assert len(gc.get_objects()) - before < 90
    assert connection._timer is timer
    scheduled = getattr(asyncio.get_running_loop(), "_scheduled", [timer])  # uvloop's are not seen
    assert [handle for handle in scheduled if not handle.cancelled()] == [timer]
    connection.abort()
    await until(lambda: connection._timer is None)
    assert timer is not None
    assert timer.cancelled()


# --- the parser's shell, without sockets -----------------------------------------------------


class FakeTransport(asyncio.Transport):
    """Records what a connection does to its socket; `feed` is the socket's other end."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__()
        self.pool = Pool("gpu-0", "http://gpu:80", limits or Limits())
        self.sent: list[bytes] = []
        self.aborted = False
        self.paused = False
        self.connection = Connection(self.pool)
        self._pair = socket.socketpair()
        self._lost = False
        self.connection.connection_made(self)
        self.pool.connections.add(self.connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        for end in self._pair:
            end.close()

    def feed(self, *pieces: bytes) -> None:
        """Reads of the socket, as long as there is one."""
        for piece in pieces:
            if not self.aborted:
                self.connection.data_received(piece)

    def hang_up(self) -> None:
        """The end of it, from whichever side."""
        if self._lost:
            return
        self._lost = True
        if not self.aborted:
            self.connection.eof_received()
        self.connection.connection_lost(None)

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._pair[0] if name == "socket" else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Recorder:
    """An exchange that writes down what it is told, and does something `at` one of them."""

    def __init__(self, at: str = "", do: Callable[[], None] = lambda: None) -> None:
        self.calls = ""
        self.head: Head | None = None
        self.body = b""
        self.error: ProxyError | None = None
        self._at = at
        self._do = do

    def on_head(self, head: Head) -> None:
        self.head = head
        self._note("head ")

    def on_data(self, data: bytes) -> None:
        assert data
        self.body += data
        self._note("data ")

    def on_end(self) -> None:
        self._note("end ")

    def on_error(self, error: ProxyError) -> None:
        self.error = error
        self._note("error ")

    def _note(self, call: str) -> None:
        self.calls += call
        if call.strip() == self._at:
            self._do()


@pytest.mark.parametrize(
    ("at", "calls"), [("head", "head "), ("data", "head data "), ("end", "head data end ")]
)
async def test_an_exchange_that_aborts_is_told_nothing_more(at: str, calls: str) -> None:
    with FakeTransport() as wire:
        exchange = Recorder(at, wire.connection.abort)
        wire.connection.send(exchange, b"GET", b"", b"")
        wire.feed(HI)
        wire.hang_up()
        assert exchange.calls == calls
        assert not wire.pool.connections
        assert not wire.pool.idle


async def test_an_exchange_may_send_the_next_request_from_the_end_of_the_last() -> None:
    with FakeTransport() as wire:
        second = Recorder()
        first = Recorder("end", lambda: wire.connection.send(second, b"GET", b"2", b""))
        wire.connection.send(first, b"GET", b"1", b"")
        wire.feed(HI)
        assert (first.calls, second.calls) == ("head data end ", "")
        wire.feed(YO)
        assert (first.body, second.body) == (b"hi", b"yo")
        assert second.calls == "head data end "
        assert wire.sent == [b"1", b"2"]


async def test_an_exchange_is_told_of_data_once_a_read() -> None:
    with FakeTransport() as wire:
        exchange = Recorder()
        wire.connection.send(exchange, b"GET", b"", b"")
        wire.feed(CHUNKED_HEAD + b"1\r\na\r\n" * 10, b"1\r\nb\r\n" * 10, b"0\r\n\r\n")
        assert exchange.calls == "head data data end "
        assert exchange.body == b"a" * 10 + b"b" * 10


async def test_a_paused_connection_reads_on_once_it_is_idle() -> None:
    with FakeTransport() as wire:
        exchange = Recorder("data", wire.connection.pause)
        wire.connection.send(exchange, b"GET", b"", b"")
        wire.feed(HI[:-1])
        assert wire.paused
        wire.feed(HI[-1:])  # was read before the pause
        assert exchange.calls == "head data data end "
        assert not wire.paused
        assert wire.pool.idle


TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", min_size=1)
VALUE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20)
FIELDS = st.lists(
    st.tuples(TOKEN.map("x-".__add__).map(str.encode), VALUE.map(str.encode)), max_size=4
)


@dataclass(frozen=True)
class Sample:
    """An answer's bytes, and what they mean."""

    wire: bytes
    status: int
    reason: bytes
    headers: Headers
    body: bytes
    delimited: bool


def section(line: bytes, headers: Headers) -> bytes:
    return b"\r\n".join([line, *(name + b": " + value for name, value in headers), b"", b""])


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any valid answer to a GET."""
    interim = draw(st.lists(st.tuples(st.sampled_from([100, 102, 103]), FIELDS), max_size=2))
    status = draw(st.sampled_from([200, 201, 204, 304, 400, 404, 500, 599]))
    reason = draw(VALUE.map(str.encode))
    headers = draw(FIELDS)
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    if status in (204, 304):
        pieces, framing = [], "none"
    body = b"".join(pieces)
    coded = body
    if framing == "length":
        headers.append((b"Content-Length", b"%d" % len(body)))
    if framing == "chunked":
        headers.insert(0, (b"transfer-encoding", b"Chunked"))
        coded = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        coded += b"0\r\n" + section(b"", draw(FIELDS))[2:]
    wire = b"".join(section(b"HTTP/1.1 %d Wait" % code, fields) for code, fields in interim)
    wire += section(b"HTTP/1.1 %d %b" % (status, reason), headers) + coded
    return Sample(wire, status, reason, headers, body, framing != "close")


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, none of them empty."""
    edges = sorted({0, len(data), *(place % len(data) for place in places)})
    return [data[start:end] for start, end in pairwise(edges)]


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # not a stopwatch
PLACES = st.lists(st.integers(0, 10_000), max_size=30)


@FUZZ
@given(st.lists(samples(), min_size=1, max_size=3), PLACES)
async def test_however_an_answer_is_cut_it_says_the_same(
    answers: list[Sample], places: list[int]
) -> None:
    with FakeTransport() as wire:
        for number, sample in enumerate(answers, 1):
            exchange = Recorder()
            wire.connection.send(exchange, b"GET", b"", b"")
            wire.feed(*cut(sample.wire, places))
            if not sample.delimited:
                assert "end" not in exchange.calls
                wire.connection.eof_received()
            assert exchange.head is not None
            assert exchange.head.status == sample.status
            assert exchange.head.reason == sample.reason
            assert exchange.head.headers == sample.headers
            assert exchange.body == sample.body
            assert re.fullmatch(r"head (data )*end ", exchange.calls)
            assert wire.aborted is not sample.delimited
            if wire.aborted or number == len(answers):
                break


@FUZZ
@given(samples(), PLACES, st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3))))
async def test_whatever_bytes_come_an_exchange_is_told_of_one_end(
    sample: Sample, places: list[int], damage: list[tuple[int, bytes]]
) -> None:
    data = bytearray(sample.wire)
    for place, bytes_ in damage:
        start = place % len(data)
        data[start : start + max(1, len(bytes_))] = bytes_
        data = data or bytearray(b"?")
    with FakeTransport() as wire:
        exchange = Recorder()
        wire.connection.send(exchange, b"GET", b"", b"")
        wire.feed(*cut(bytes(data), places))
        wire.hang_up()
        assert re.fullmatch(r"(head (data )*)?error |head (data )*end ", exchange.calls)
        assert not wire.pool.connections
        assert not wire.pool.idle
        assert wire.connection._timer is None
