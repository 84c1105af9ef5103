"""One request on its way through the phases: what it is known by, and what became of it.

A record that the phases write into and `finish` reads; it decides nothing.
"""

from aiohttp import web

from lora_proxy.errors import Api, ProxyError
from lora_proxy.metrics import NONE

CLIENT_LEFT = "499"  # nginx's code for a client that closed first; never sent, only counted


class Call:
    """One request.

    Attributes:
        request: As aiohttp has it.
        id: Sent upstream and back as `x-request-id`.
        started: Seconds on the loop's clock.
        path: As it came, without the query.
        query: As it came.
        api: Whose error shape its client understands.
        endpoint: A label for metrics.
        adapter: The public adapter's or base model's name, once resolved.
        upstream: The one last tried.
        code: The status that was sent, or would have been.
        first_byte: When the first bytes of an event stream came; 0 if none did.
        broken: What ended the answer after it had begun.
    """

    __slots__ = (
        "adapter",
        "api",
        "broken",
        "code",
        "endpoint",
        "first_byte",
        "id",
        "path",
        "query",
        "request",
        "started",
        "upstream",
    )

    def __init__(self, request: web.BaseRequest, request_id: str, now: float) -> None:
        self.request = request
        self.id = request_id
        self.started = now
        self.path, _, self.query = request.raw_path.partition("?")
        self.api = api_of(self.path)
        self.endpoint = "other"
        self.adapter = NONE
        self.upstream = NONE
        self.code = CLIENT_LEFT  # until an answer is decided, or breaks off
        self.first_byte = 0.0
        self.broken: ProxyError | None = None


def api_of(path: str) -> Api:
    """Whose error shape the clients of a path understand."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"
