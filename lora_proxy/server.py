"""aiohttp's low-level server, with our word for what goes wrong below the handler.

Requests that aiohttp's parser refuses never reach `Proxy`; their answers are made here, in
the same shape.
"""

import asyncio
import logging
import os
from typing import Any

import orjson
from aiohttp import http_exceptions, web

from lora_proxy.errors import ProxyError

log = logging.getLogger(__name__)

LINGER = 5.0  # seconds of reading on after a refused body, so that the client can read why


class Protocol(web.RequestHandler):
    """One client connection."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """As aiohttp does it, but tells the reader of a body whose chunking breaks off.

        aiohttp only queues its error answer, and leaves the reader to wait for more.
        """
        super().data_received(data)
        request = self._current_request
        # Nothing can come after a body that has no end, except that error.
        if self._messages and request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("broken chunks"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what is not HTTP, or too much of it. Always closes the connection."""
        if isinstance(exc, ConnectionError):
            raise exc  # the client left, or was cut off: nobody is there to be answered
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        error = self._refusal(exc, message or "malformed request")
        headers = {
            "content-type": "application/json",
            "server": "lora-proxy",
            "x-request-id": os.urandom(8).hex(),
            "x-lora-proxy-error": error.code,
        }
        log.debug("refused a request from %s: %s", request.remote, error.message)
        answer = web.Response(
            status=error.status, body=orjson.dumps(error.body("openai")), headers=headers
        )
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Says nothing of a broken body, which is met again as its rest is thrown away."""
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)

    def _refusal(self, exc: BaseException | None, message: str) -> ProxyError:
        too_many = message.startswith("Too many headers")
        if too_many or isinstance(exc, http_exceptions.LineTooLong):
            return ProxyError(
                "headers_too_large",
                f"the request line or a header is larger than {self.max_line_size} bytes, or "
                f"there are more than {self.max_headers}; send less, or raise limits.headers",
            )
        # Only the first line: the others quote the request, which may hold a secret.
        why = message.splitlines()[0].rstrip(":")
        return ProxyError("bad_request", f"not a well-formed HTTP request: {why}")


class Server(web.Server):
    """Makes a `Protocol` for each connection.

    Args:
        handler: `Proxy`.
        header_limit: Bytes that one header field, or the request line, may take.
    """

    def __init__(self, handler: Any, *, header_limit: int) -> None:
        # A client that leaves cancels its handler, which closes the upstream connection.
        super().__init__(handler, handler_cancellation=True)
        self._options: dict[str, Any] = {
            "access_log": None,
            "logger": log,
            "keepalive_timeout": 75.0,
            "lingering_time": LINGER,
            "max_line_size": header_limit,
            "max_field_size": header_limit,
            "max_headers": header_limit // 32,
        }

    def __call__(self) -> web.RequestHandler:
        """A protocol for a new connection."""
        return Protocol(self, loop=asyncio.get_running_loop(), **self._options)
