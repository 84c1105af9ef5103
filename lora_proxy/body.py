"""A client's request body, read whole within limits.

Knows aiohttp's request and nothing of what the bytes mean.
"""

import asyncio

from aiohttp import web

from lora_proxy.errors import ProxyError

_CODINGS = ("identity", "gzip", "deflate")  # the last two are taken off by aiohttp's parser


async def read_body(request: web.BaseRequest, limit: int, silence: float) -> bytes:
    """Reads the whole body, freed of its transfer and content coding.

    Args:
        request: Its head has been read.
        limit: Bytes; more is refused, at once where `content-length` says so.
        silence: Seconds without a byte after which the client is given up.

    Raises:
        ProxyError: `body_too_large`, `request_timeout`; `bad_request` for a broken coding.
        ConnectionError: The client left.
    """
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding not in _CODINGS:
        raise ProxyError(
            "bad_request",
            f"the body's content-encoding is none of {', '.join(_CODINGS)}; use one of these",
        )
    if request.headers.get("expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # else aiohttp takes the answer for begun
    content = request.content
    parts: list[bytes] = []
    size = 0
    try:
        while not content.at_eof():
            async with asyncio.timeout(silence):
                part = await content.readany()
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except TimeoutError:
        raise ProxyError(
            "request_timeout",
            f"the body stopped after {size} bytes for {silence:g} s; send it again, whole",
        ) from None
    except (web.RequestPayloadError, ValueError):
        raise ProxyError(
            "bad_request", "the body's transfer or content coding is broken; send it again, whole"
        ) from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> ProxyError:
    return ProxyError(
        "body_too_large", f"the body is larger than {limit} bytes; send less, or raise limits.body"
    )
