"""The way to one upstream: pooled connections, and answers that can be awaited.

Owns which connections exist and which are kept. Knows nothing of framing (connection), of
models, adapters or vLLM.

Between requests a connection waits in the pool's `idle` set, newest last. The newest is
taken first; what has been idle for longer than `keepalive` is closed instead of used.

A kept connection may have been closed by the server while our request was on its way.
That is no fault of anybody, so `Pool.request` sends once more on a fresh connection, but
only if the old one died without a byte of answer and soon after the request was sent
(`connection.STALE_WINDOW`): a server that dies later may have been generating.
"""

import asyncio
import ssl as tls
from collections import deque
from typing import cast
from urllib.parse import urlsplit

from lora_proxy.connection import Connection, Head, Limits
from lora_proxy.errors import ProxyError
from lora_proxy.types import Headers

BUFFER_HIGH = 256 * 1024  # bytes of answer waiting for a slow reader before the socket is paused


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


class Pool:
    """The connections to one upstream.

    Args:
        name: The upstream's name, for messages.
        url: `http://HOST:PORT` or `https://…`; nothing behind the authority.
        limits: How long and how much.
        ssl: The TLS settings of an https upstream.
        server_name: Whose certificate it must show, where that is not the url's host.
    """

    def __init__(
        self,
        name: str,
        url: str,
        limits: Limits,
        ssl: tls.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        self.name = name
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.authority = parts.netloc.encode("ascii")
        if server_name is not None:
            self.authority = f"{server_name}:{self.port}".encode("ascii")
        self.limits = limits
        self.idle: dict[Connection, None] = {}
        self.connections: set[Connection] = set()
        self._ssl = (ssl or tls.create_default_context()) if parts.scheme == "https" else None
        self._server_name = server_name if parts.scheme == "https" else None
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
                    lambda: Connection(self),
                    self.host,
                    self.port,
                    ssl=self._ssl,
                    server_hostname=self._server_name,
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

    def keep(self, connection: Connection) -> None:
        """Takes a connection that is ready for a further request."""
        self.idle[connection] = None

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
