"""One HTTP/1.1 connection to an upstream: framing, silence, one request at a time.

Owns a socket and the parser on it. Knows nothing of how connections are kept or opened
(upstream), nor of models: a request is a head and a body in bytes, an answer is what an
`Exchange` is told.

Theory of operation
-------------------
A `Connection` is an `asyncio.Protocol` around httptools' response parser. It reports to
its request's `Exchange`: `on_head` once, `on_data` at most once per read of the socket,
then exactly one of `on_end` and `on_error`. Parser callbacks only record, or refuse by
raising; an exchange is told after the parser has returned, so that it may at once send the
next request on the same connection without the parser seeing bytes of two answers as one.
"""

import asyncio
import select
from dataclasses import dataclass
from typing import Protocol, cast

import httptools

from lora_proxy.errors import ProxyError
from lora_proxy.types import Headers

STALE_WINDOW = 1.0  # seconds; a closed socket answers with a reset within one round trip
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


class Owner(Protocol):
    """Who keeps connections between requests; `upstream.Pool`.

    Attributes:
        name: The upstream's name, for messages.
        limits: How long and how much.
    """

    name: str
    limits: Limits

    def keep(self, connection: "Connection") -> None:
        """The connection can take a further request."""

    def forget(self, connection: "Connection") -> None:
        """The connection is closing; may come more than once."""


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
        "_owner",
        "_parser",
        "_paused",
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

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
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

    # --- what the owner and the exchange may do ---------------------------------------

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
            self._timer = self._loop.call_later(self._owner.limits.read, self._check_silence)

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
        elif not fault and self._overhead > self._owner.limits.headers:
            fault = f"its headers exceed {self._owner.limits.headers} bytes"
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
        """Leaves the owner's books; fails the request that was under way."""
        self._owner.forget(self)
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
                    f"upstream {self._owner.name} broke off before {part} ({why}); "
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
        for name, value in self._headers:
            if name.lower() == b"transfer-encoding" and value.strip().lower() != b"chunked":
                raise httptools.HttpParserError(f"transfer-encoding {value!r} was not asked for")
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
            self._owner.keep(self)
        else:
            self._shut()
        if exchange is not None:
            exchange.on_end()

    def _invalid(self, why: str) -> ProxyError:
        return ProxyError(
            "upstream_invalid",
            f"upstream {self._owner.name} did not answer in valid HTTP/1.1 ({why}); "
            "check that its url is a vLLM server",
        )

    def _shut(self) -> None:
        self._owner.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def _check_silence(self) -> None:
        """One lazy timer a connection: re-armed, not re-made, as bytes come in."""
        self._timer = None
        if self._exchange is None:
            return  # idle; the next send() arms it again
        timeout = self._owner.limits.read
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
                f"upstream {self._owner.name} sent nothing for {timeout:g} s; "
                "raise timeouts.read if its answers take longer",
            )
        )
