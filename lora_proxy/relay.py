"""The answer on its way back: whole or chunk by chunk, with the public name put back.

Owns what a client gets once an upstream has begun to answer, also when it breaks off.
Knows nothing of how the upstream was chosen.
"""

import asyncio
import logging
import socket
import struct

import orjson
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from lora_proxy import rewrite
from lora_proxy.call import Call
from lora_proxy.errors import ProxyError
from lora_proxy.types import Headers
from lora_proxy.upstream import Response

log = logging.getLogger(__name__)

WHOLE = 1 << 20  # bytes; a JSON answer up to this size is restored whole and keeps a length


async def relay(
    call: Call, response: Response, served: str, public: str, body: bytes | None
) -> web.StreamResponse:
    """Sends the answer on, with the public name put back.

    Args:
        call: The request.
        response: Its head has been read.
        served: What the upstream calls the model; "" where there is none.
        public: What the client calls it.
        body: The whole body, where it has been read already.
    """
    content_type = (header(response.headers, b"content-type") or b"").lower()
    is_json = content_type.startswith(b"application/json")
    is_events = content_type.startswith(b"text/event-stream")
    encoded = header(response.headers, b"content-encoding") not in (None, b"identity")
    named = bool(served) and served != public and (is_json or is_events) and not encoded
    restorer = rewrite.Restorer(served, public) if named else None
    if body is None and is_json and call.request.method != "HEAD":
        body = await response.read_all(WHOLE)
    if body is not None:
        if restorer is not None:
            body = restorer.feed(body) + restorer.flush()
            if response.status >= 400:
                body = rewrite.restore_text(body, served, public)
        return _whole(call, response, body)
    return await _streamed(call, response, restorer, is_events=is_events)


def _whole(call: Call, response: Response, body: bytes) -> web.Response:
    headers = _client_headers(call, response, keep_length=False)
    return web.Response(
        status=response.status, reason=_text(response.reason), headers=headers, body=body
    )


async def _streamed(
    call: Call,
    response: Response,
    restorer: rewrite.Restorer | None,
    *,
    is_events: bool,
) -> web.StreamResponse:
    """Chunk by chunk. A write waits for a slow client, which pauses the upstream."""
    answer = web.StreamResponse(
        status=response.status,
        reason=_text(response.reason),
        # An event stream may grow by an error event.
        headers=_client_headers(call, response, keep_length=restorer is None and not is_events),
    )
    await answer.prepare(call.request)
    tail = b"\n\n"
    try:
        while data := await response.read():
            if restorer is not None and not (data := restorer.feed(data)):
                continue
            if is_events and not call.first_byte:
                call.first_byte = asyncio.get_running_loop().time()
            await answer.write(data)
            tail = data[-4:] if len(data) >= 4 else (tail + data)[-4:]
    except ProxyError as error:
        await _broken(call, answer, error, at_boundary=is_events and _ends_event(tail))
        return answer
    if restorer is not None and (rest := restorer.flush()):
        await answer.write(rest)
    await answer.write_eof()
    return answer


async def _broken(
    call: Call, answer: web.StreamResponse, error: ProxyError, *, at_boundary: bool
) -> None:
    """The upstream failed in the middle of an answer."""
    log.warning("request %s: broken off: %s: %s", call.id, error.code, error.message)
    call.broken = error
    call.code = str(error.status)  # what it would have been, had the failure come sooner
    if at_boundary:
        event = b"event: error\n" if call.api == "anthropic" else b""
        data = orjson.dumps(error.body(call.api))
        await answer.write(event + b"data: " + data + b"\n\n")
        await answer.write_eof()
    else:
        abort(call.request)


def _client_headers(call: Call, response: Response, *, keep_length: bool) -> CIMultiDict[str]:
    fields = rewrite.client_headers(
        response.headers, request_id=call.id.encode(), keep_length=keep_length
    )
    headers = CIMultiDict((_text(name), _text(value)) for name, value in fields)
    headers["server"] = "lora-proxy"
    headers["x-lora-proxy-upstream"] = call.upstream
    return headers


def abort(request: web.BaseRequest) -> None:
    """Cuts the client off, so that it cannot take what it has for the whole."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:
        # Here a plain close would be the proper end of the body; a reset is not.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def error_body(response: Response) -> bytes | None:
    """The body of an error answer, which is small and may speak of the model; else None."""
    return await response.read_all(WHOLE) if response.status >= 400 else None


def _ends_event(tail: bytes) -> bool:
    return tail.endswith((b"\n\n", b"\r\n\r\n"))


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first field of this name, which is in lower case."""
    for key, value in headers:
        if key.lower() == name:
            return value
    return None


def _text(data: bytes) -> str:
    """Header bytes as aiohttp wants them: UTF-8, else each byte for itself."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
