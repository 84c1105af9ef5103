"""A server that says exactly the bytes it is told to, however wrong they are.

Owns one scripted conversation per connection; knows no HTTP beyond where a request ends.
"""

import asyncio
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Self

Script = Callable[["RawConnection"], Awaitable[None]]


class RawConnection:
    """One accepted connection, in the hands of the script."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[bytes]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._seen = seen

    async def request(self) -> bytes:
        """The next request: its head, and its body where content-length announces one.

        Raises:
            asyncio.IncompleteReadError: The peer has closed; the script just ends.
        """
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        body = await self._reader.readexactly(int(length[1])) if length else b""
        self._seen.append(head + body)
        return head + body

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def until_closed(self) -> bytes:
        """Sends nothing more until the peer closes; what it said meanwhile."""
        return await self._reader.read()

    def reset(self) -> None:
        """Closes with a TCP reset instead of a proper end."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class RawServer:
    r"""Plays a script with each connection, and closes it when the script ends.

        async def script(peer):
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-len")

        async with RawServer(script) as server:
            ... server.url ...

    Attributes:
        connections: How many were accepted.
        requests: Every request that the scripts have read, as bytes.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._server: asyncio.Server | None = None
        self._playing: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.requests: list[bytes] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._play, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)
        await self._server.wait_closed()

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._playing.add(task)
        self.connections += 1
        try:
            await self._script(RawConnection(reader, writer, self.requests))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the peer has gone, or the server is stopped: either ends the script
        finally:
            self._playing.discard(task)
            writer.close()
