"""HTTP/1.1 to one upstream: pooled connections, backpressure, honest failures.

Owns sockets, framing and the pool. Knows nothing of models, adapters or vLLM: a request
is a head and a body in bytes, an answer is what `Exchange` is told.

Theory of operation
-------------------
A `Connection` is an `asyncio.Protocol` around httptools' response parser. It serves one
request at a time and reports to that request's `Exchange`: `on_head` once, `on_data` at
most once per read of the socket, then exactly one of `on_end` and `on_error`. Parser
callbacks only record, or refuse by raising; an exchange is told after the parser has
returned, so that it may at once send the next request on the same connection without the
parser seeing bytes of two answers as one.

Between requests a connection waits in the pool's `idle` set, newest last. The newest is
taken first; what has been idle for longer than `keepalive` is closed instead of used.

A kept connection may have been closed by the server while our request was on its way.
That is no fault of anybody, so `Pool.request` sends once more on a fresh connection, but
only if the old one died without a byte of answer and soon after the request was sent
(`STALE_WINDOW`): a server that dies later may have been generating.
"""

import asyncio
import select
import ssl as tls
from collections import deque
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from lora_proxy.errors import ProxyError
from lora_proxy.types import Headers

STALE_WINDOW = 1.0  # seconds; a closed socket answers with a reset within one round trip
BUFFER_HIGH = 256 * 1024  # bytes of answer waiting for a slow reader before the socket is paused
COALESCE_BELOW = 64 * 1024  # bytes; a smaller body is cheaper to copy behind its head than to send

FRAMING = (b"content-length", b"transfer-encoding")  # without one, the close ends the body


class Head:
    """Status line and header fields of an answer.

    Attributes:
        status: The HTTP status, never 1xx.
        reason: The reason phrase as sent; often empty.
        headers: Fields in order, names as sent.
    """

    __slots__ = ("headers", "reason", "status")

    def __init__(self, status: int, reason: bytes, headers: Headers) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers


class Exchange(Protocol):
    """Who is told of one request's answer. Calls come from the event loop, in this order."""

    def on_head(self, head: Head) -> None:
        """The final status and headers are here."""

    def on_data(self, data: bytes) -> None:
        """Some of the body, never empty, freed of its transfer coding."""

    def on_end(self) -> None:
        """The body is complete; the connection is the pool's again."""

    def on_error(self, error: ProxyError) -> None:
        """The answer will not be completed; the connection is gone."""


class Connection(asyncio.Protocol):
    """One socket to the upstream; at most one request under way."""

    __slots__ = (
        "_arrivals",
        "_chunks",
        "_complete",
        "_exchange",
        "_head",
        "_headers",
        "_keep",
        "_last_activity",
        "_loop",
        "_method",
        "_overhead",
        "_parser",
        "_paused",
        "_pool",
        "_reason",
        "_reused",
        "_sent_at",
        "_surplus",
        "_timer",
        "_told",
        "_transport",
        "idle_since",
        "stale",
    )

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._arrivals = select.poll()
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reused = False
        self.stale = False  # kept from an earlier request, and died at once without an answer
        self._paused = False
        self._method = b""
        self._sent_at = self._last_activity = self.idle_since = 0.0
        self._begin()

    def _begin(self) -> None:
        """Forgets the last answer."""
        self._head: Head | None = None
        self._headers: Headers = []
        self._reason = b""
        self._overhead = 0  # bytes since the last piece of body: heads, trailers, framing
        self._chunks: list[bytes] = []
        self._told = False  # the exchange has had its on_head
        self._complete = False  # the answer's last byte has been parsed
        self._keep = False  # the answer leaves the connection fit for a further request
        self._surplus = False  # bytes of a further answer, which nobody asked for

    # --- what the pool and the exchange may do ---------------------------------------

    @property
    def usable(self) -> bool:
        """Connected, with no request under way, and silent.

        Asks the kernel too (under a microsecond): a close, or an answer that nobody asked
        for, may be waiting there unread, and would be taken for the next request's.
        """
        return (
            self._exchange is None
            and self._transport is not None
            and not self._transport.is_closing()
            and not self._arrivals.poll(0)
        )

    def send(self, exchange: Exchange, method: bytes, head: bytes, body: bytes) -> None:
        """Sends one request; the answer goes to `exchange`.

        Args:
            exchange: Told of the answer, or of the failure, later; never during this call.
            method: Needed to frame the answer: HEAD has no body.
            head: Request line and fields, with the blank line.
            body: The whole body; its length is in `head`.
        """
        transport = cast("asyncio.Transport", self._transport)
        self._exchange = exchange
        self._method = method
        self._sent_at = self._last_activity = self._loop.time()
        if len(body) < COALESCE_BELOW:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        if self._timer is None:
            self._timer = self._loop.call_later(self._pool.limits.read, self._check_silence)

    def pause(self) -> None:
        """Stops reading: the reader behind the exchange is full."""
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Reads on; silence is counted from now."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._last_activity = self._loop.time()
            self._transport.resume_reading()

    def abort(self) -> None:
        """Drops the connection at once, and its exchange without a word."""
        self._exchange = None
        self._shut()

    def fail(self, error: ProxyError) -> None:
        """Drops the connection at once, and tells its exchange why."""
        exchange, self._exchange = self._exchange, None
        self._shut()
        if exchange is not None:
            exchange.on_error(error)

    # --- asyncio.Protocol ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is there."""
        self._transport = cast("asyncio.Transport", transport)
        self._arrivals.register(transport.get_extra_info("socket"), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, then tells the exchange what it recorded."""
        self._last_activity = self._loop.time()
        if self._exchange is None:  # nobody asked: never let it stand before a later answer
            self._shut()
            return
        self._overhead += len(data)
        fault = self._feed(data)
        if self._chunks:
            self._overhead = 0
        elif not fault and self._overhead > self._pool.limits.headers:
            fault = f"its headers exceed {self._pool.limits.headers} bytes"
        self._deliver()  # what was valid before a fault has been sent in good faith
        if self._complete:
            self._finish()  # a fault behind a whole answer is no worse than any other surplus
        elif fault:
            self.fail(self._invalid(fault))

    def eof_received(self) -> bool:
        """The end of a body that only the close delimits; otherwise a fault."""
        if self._head is None or self._complete:
            return False
        if not any(name.lower() in FRAMING for name, _ in self._head.headers):
            self._complete = True
            self._finish()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Leaves the pool; fails the request that was under way."""
        self._pool.forget(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._exchange is not None:
            self.stale = (
                self._reused
                and self._head is None
                and self._overhead == 0
                and self._loop.time() - self._sent_at < STALE_WINDOW
            )
            why = str(exc) if exc else "the connection was closed"
            part = "its headers" if self._head is None else "its body was complete"
            self.fail(
                ProxyError(
                    "upstream_closed",
                    f"upstream {self._pool.name} broke off before {part} ({why}); "
                    "see the upstream's log",
                )
            )

    # --- httptools' callbacks: record, or raise --------------------------------------

    def on_message_begin(self) -> None:
        """A status line begins; after a complete answer it is one too many."""
        if self._complete:
            self._surplus = True

    def on_status(self, reason: bytes) -> None:
        """The reason phrase."""
        self._reason += reason  # it comes in two where a read ends inside it

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field, in the header section or among the trailers (which are dropped)."""
        if self._head is None:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The final head, or an interim one to be skipped."""
        if self._surplus:
            return
        status = self._parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101:
                raise httptools.HttpParserError(f"status {status:03} was not asked for")
            self._headers = []
            self._reason = b""
            return
        self._head = Head(status, self._reason, self._headers)
        self._keep = self._parser.should_keep_alive()  # asked now: llhttp forgets at the end
        if self._method == b"HEAD":
            self._complete = True  # whatever length it announces, nothing follows
            self._keep = False  # but the parser would wait for it

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        if not self._complete:
            self._chunks.append(data)

    def on_message_complete(self) -> None:
        """The end of the answer, unless it was an interim one."""
        if self._head is not None:
            self._complete = True

    # --- inside ----------------------------------------------------------------------

    def _feed(self, data: bytes) -> str | None:
        """Parses, and says what is wrong with the bytes, if anything is."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            return str(error.__context__ or error)  # a callback's own error is the context
        return None

    def _deliver(self) -> None:
        """Tells the exchange what is new. It may abort at any call: then nobody listens."""
        if not self._told and self._head is not None and self._exchange is not None:
            self._told = True
            self._exchange.on_head(self._head)
        if self._chunks and self._exchange is not None:
            chunks, self._chunks = self._chunks, []
            self._exchange.on_data(chunks[0] if len(chunks) == 1 else b"".join(chunks))

    def _finish(self) -> None:
        """Gives the connection back, or closes it, and ends the exchange."""
        exchange, self._exchange = self._exchange, None
        transport = self._transport
        reusable = (
            transport is not None
            and self._keep
            and not self._surplus
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0  # answered before it read our body
        )
        if reusable:
            self.resume()
            self._begin()
            self._reused = True
            self.idle_since = self._last_activity
            self._pool.idle[self] = None
        else:
            self._shut()
        if exchange is not None:
            exchange.on_end()

    def _invalid(self, why: str) -> ProxyError:
        return ProxyError(
            "upstream_invalid",
            f"upstream {self._pool.name} did not answer in valid HTTP/1.1 ({why}); "
            "check that its url is a vLLM server",
        )

    def _shut(self) -> None:
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def _check_silence(self) -> None:
        """One lazy timer a connection: re-armed, not re-made, as bytes come in."""
        self._timer = None
        if self._exchange is None:
            return  # idle; the next send() arms it again
        timeout = self._pool.limits.read
        now = self._loop.time()
        if self._paused:  # the silence is our reader's
            self._last_activity = now
        left = self._last_activity + timeout - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_silence)
            return
        self.fail(
            ProxyError(
                "upstream_timeout",
                f"upstream {self._pool.name} sent nothing for {timeout:g} s; "
                "raise timeouts.read if its answers take longer",
            )
        )


class Response:
    """An answer to be awaited: the `Exchange` of code that is not on the hottest path.

    At most `BUFFER_HIGH` bytes (and one read of the socket) wait in it; then the upstream
    is paused until the reader has caught up.
    """

    __slots__ = ("_connection", "_done", "_error", "_head", "_pieces", "_size", "_waiter")

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self._head: Head | None = None
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._done = False
        self._error: ProxyError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def status(self) -> int:
        """The HTTP status."""
        return cast("Head", self._head).status

    @property
    def reason(self) -> bytes:
        """The reason phrase as sent."""
        return cast("Head", self._head).reason

    @property
    def headers(self) -> Headers:
        """The header fields as sent."""
        return cast("Head", self._head).headers

    @property
    def complete(self) -> bool:
        """All of the body has arrived; `read` will not wait."""
        return self._done

    def on_head(self, head: Head) -> None:
        """`Exchange`."""
        self._head = head
        self._wake()

    def on_data(self, data: bytes) -> None:
        """`Exchange`."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > BUFFER_HIGH and self._connection is not None:
            self._connection.pause()
        self._wake()

    def on_end(self) -> None:
        """`Exchange`."""
        self._done = True
        self._connection = None
        self._wake()

    def on_error(self, error: ProxyError) -> None:
        """`Exchange`."""
        self._error = error
        self._connection = None
        self._wake()

    async def wait_head(self) -> None:
        """Waits for status and headers.

        Raises:
            ProxyError: `upstream_closed`, `upstream_invalid` or `upstream_timeout`.
        """
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def read(self) -> bytes:
        """All that has arrived, at least one byte; `b""` at the end.

        Raises:
            ProxyError: As `wait_head`, once everything that came before has been read.
        """
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._done:
                return b""
            await self._wait()
        pieces = self._pieces
        data = pieces.popleft() if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    async def read_all(self, limit: int) -> bytes | None:
        """The whole body, or None as soon as it exceeds `limit` bytes (nothing is lost).

        Raises:
            ProxyError: As `read`.
        """
        parts: list[bytes] = []
        size = 0
        while data := await self.read():
            parts.append(data)
            size += len(data)
            if size > limit:
                self._pieces.extendleft(reversed(parts))
                self._size += size
                return None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Ends it, wherever it stands.

        An unfinished answer closes its connection at once, which is how vLLM learns that
        nobody wants the rest.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an upstream may take, and how much it may send unasked.

    Attributes:
        connect: Seconds for TCP and TLS together.
        read: Seconds of silence after which an answer is given up.
        keepalive: Seconds that a connection may be idle and still be used. uvicorn, and so
            vLLM, closes its side after 5.
        headers: Bytes that may come without any of the body among them: status line and
            headers, interim answers, trailers. One read of the socket more may be held.
    """

    connect: float = 5.0
    read: float = 600.0
    keepalive: float = 4.0
    headers: int = 65536


class Pool:
    """The connections to one upstream.

    Args:
        name: The upstream's name, for messages.
        url: `http://HOST:PORT` or `https://…`; nothing behind the authority.
        limits: How long and how much.
        ssl: The TLS settings of an https upstream.
    """

    def __init__(
        self,
        name: str,
        url: str,
        limits: Limits,
        ssl: tls.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        self.name = name
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.authority = parts.netloc.encode("ascii")
        self.limits = limits
        self.idle: dict[Connection, None] = {}
        self.connections: set[Connection] = set()
        self._ssl = (ssl or tls.create_default_context()) if parts.scheme == "https" else None
        self._closed = False

    def take_idle(self) -> Connection | None:
        """The kept connection that was used last, if one is young enough."""
        oldest_allowed = asyncio.get_running_loop().time() - self.limits.keepalive
        while self.idle:
            connection, _ = self.idle.popitem()
            if connection.usable and connection.idle_since > oldest_allowed:
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        """A new connection.

        Raises:
            ProxyError: `upstream_connect`: refused, unreachable, too slow, TLS failed, or
                the pool is closed.
        """
        if self._closed:
            raise self._unreachable("the proxy is shutting down")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limits.connect):
                transport, connection = await loop.create_connection(
                    lambda: Connection(self), self.host, self.port, ssl=self._ssl
                )
        except TimeoutError:
            raise self._unreachable(f"no connection within {self.limits.connect:g} s") from None
        except tls.SSLError as error:
            why = getattr(error, "verify_message", None) or error.reason or error
            raise self._unreachable(f"TLS failed: {why}; see its tls settings") from error
        except OSError as error:
            raise self._unreachable(error.strerror or str(error) or "it hung up") from error
        if self._closed:
            transport.abort()  # type: ignore[unreachable]  # close() may have run meanwhile
            raise self._unreachable("the proxy is shutting down")
        # Not on the books before: uvloop does not always tell a cancelled one of its end.
        self.connections.add(connection)
        return connection

    async def request(
        self, method: bytes, target: bytes, headers: Headers, body: bytes = b""
    ) -> Response:
        """Sends one request and waits for the answer's head.

        Args:
            method: Upper case.
            target: Path and query, already encoded.
            headers: Complete, `host` and `content-length` included.
            body: The whole body.

        Returns:
            The response; the caller must `close` it.

        Raises:
            ProxyError: `upstream_connect` (replayable), or as `Response.wait_head`.
        """
        head = request_head(method, target, headers)
        connection = self.take_idle()
        while True:
            if connection is None:
                connection = await self.connect()
            response = Response(connection)
            connection.send(response, method, head, body)
            try:
                await response.wait_head()
            except ProxyError:
                if not connection.stale:
                    raise
                connection = None
            except BaseException:
                response.close()
                raise
            else:
                return response

    def forget(self, connection: Connection) -> None:
        """Takes a closing connection off the books; more than once is fine."""
        self.connections.discard(connection)
        self.idle.pop(connection, None)

    def close(self) -> None:
        """Closes every connection, busy ones too, and opens no more."""
        self._closed = True
        for connection in tuple(self.connections):
            connection.fail(
                ProxyError(
                    "upstream_closed",
                    f"the proxy stopped using upstream {self.name} before its answer was "
                    "complete; send the request again",
                )
            )

    def _unreachable(self, why: str) -> ProxyError:
        return ProxyError(
            "upstream_connect",
            f"upstream {self.name} cannot be reached ({why}); "
            "check that the server runs and that its url is right",
        )


def request_head(method: bytes, target: bytes, headers: Headers) -> bytes:
    """Request line and fields in one piece of bytes, with the blank line."""
    parts = [method, b" ", target, b" HTTP/1.1\r\n"]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)
