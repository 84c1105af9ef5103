"""The phases of one request, on aiohttp's server.

    admit -> peek -> resolve -> route -> lease -> forward -> relay -> finish

Owns the order of the phases and what happens when one fails. What each decides is the
business of `access`, `rewrite`, `catalog`, `routing` and `residency`; who holds the state
is `fleet`; how bytes reach the upstream is `upstream`.

Until the first byte of an answer has been sent, a failure that is the upstream's leads to
the next candidate, or to an error in the client's API shape. After it there is no way back:
an event stream ends with an error event, anything else by closing the connection, so that
nobody takes half an answer for a whole one.
"""

import asyncio
import logging
import os
import re
import socket
import struct
import time
from dataclasses import dataclass
from itertools import count

import orjson
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from lora_proxy import access, rewrite, vllm
from lora_proxy.access import Endpoint, Keys, Kind
from lora_proxy.body import read_body
from lora_proxy.catalog import Catalog, Target
from lora_proxy.errors import Api, ProxyError
from lora_proxy.fleet import Choice, Fleet
from lora_proxy.member import Lease, Member
from lora_proxy.metrics import CONTENT_TYPE, NONE, Metrics
from lora_proxy.types import Adapter, Headers
from lora_proxy.upstream import Response

log = logging.getLogger(__name__)

WHOLE = 1 << 20  # bytes; a JSON answer up to this size is restored whole and keeps a length
CLIENT_LEFT = "499"  # nginx's code for a client that closed first; never sent, only counted

# Probes and scrapers have no key, and learn nothing of a request.
_OPEN = frozenset({Kind.HEALTH, Kind.READY, Kind.METRICS})

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_TARGET = re.compile(r"[\x21-\x7e]*\Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask of the proxy.

    Attributes:
        body: Bytes in a request's body.
        headers: Bytes in its request line and headers.
        silence: Seconds without a byte in the middle of a body.
        strict_paths: Forward listed paths only.
        chat_template: Pass a client's own chat template on.
    """

    body: int
    headers: int
    silence: float
    strict_paths: bool
    chat_template: bool


class Call:
    """One request on its way through the phases; what `finish` will report."""

    __slots__ = (
        "adapter",
        "api",
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
        self.api = _api(self.path)
        self.endpoint = "other"
        self.adapter = NONE
        self.upstream = NONE
        self.code = CLIENT_LEFT  # until an answer is decided, or breaks off
        self.first_byte = 0.0  # of an event stream


class Proxy:
    """aiohttp's request handler.

    Args:
        fleet: Started.
        metrics: Shared with the fleet.
        limits: What clients may ask.
        keys: Who may ask.
        authorizations: Upstream name -> the `authorization` field that it wants.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        limits: Limits,
        keys: Keys,
        authorizations: dict[str, bytes],
    ) -> None:
        self.draining = False
        self._fleet = fleet
        self._metrics = metrics
        self._limits = limits
        self._keys = keys
        self._authorizations = authorizations
        self._created = int(time.time())
        self._listing: tuple[Catalog, bytes] | None = None
        self._id_prefix = os.urandom(6).hex()
        self._ids = count(1)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request, whatever happens."""
        call = Call(request, self._request_id(request), self._now())
        try:
            answer = await self._answer(call)
        except ProxyError as error:
            answer = self.refuse(call, error)
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client left; leases and connections were given back on the way
        except Exception as error:
            log.exception("request %s failed inside the proxy", call.id)
            if request.writer.output_size:
                _abort(request)
                raise ConnectionAbortedError("the answer had begun") from error
            message = f"the proxy failed; its log says more under request id {call.id}"
            answer = self.refuse(call, ProxyError("internal_error", message))
        else:
            if call.code == CLIENT_LEFT:
                call.code = str(answer.status)
        finally:
            self._finish(call)
        return answer

    # --- admit -----------------------------------------------------------------------

    def _request_id(self, request: web.BaseRequest) -> str:
        """The client's, if it is one token of printable ASCII; else a new one."""
        given = request.headers.get("x-request-id", "")
        return given if _REQUEST_ID.match(given) else f"{self._id_prefix}-{next(self._ids):x}"

    async def _answer(self, call: Call) -> web.StreamResponse:
        endpoint = access.endpoint(call.request.method, call.path, strict=self._limits.strict_paths)
        call.endpoint, call.api = endpoint.label, _api(endpoint.path)
        self._measure(call)
        if not _TARGET.match(call.query):
            raise ProxyError("invalid_path", "percent-encode the query: it has bytes of no URL")
        if endpoint.kind not in _OPEN:
            self._admit(call)
        match endpoint.kind:
            case Kind.INFERENCE | Kind.OTHER:
                return await self._forwarded(call, endpoint)
            case Kind.MODELS:
                return self._local(call, self._models())
            case Kind.MODEL:
                return self._local(call, self._model(endpoint))
            case Kind.METRICS:
                self._fleet.export()
                return self._local(call, self._metrics.exposition(), content_type=CONTENT_TYPE)
            case Kind.HEALTH:
                return self._local(call, b'{"status":"ok"}')
            case Kind.READY:
                return self._ready(call)

    def _admit(self, call: Call) -> None:
        headers = call.request.headers
        authorization, x_api_key = headers.get("authorization"), headers.get("x-api-key")
        try:
            self._keys.admit(authorization, x_api_key)
        except ProxyError:
            reason = "missing" if authorization is None and x_api_key is None else "unknown"
            self._metrics.auth_failures(reason).inc()
            raise

    def _measure(self, call: Call) -> None:
        """Refuses headers that are too large together; one alone does not get this far."""
        size = len(call.path) + len(call.query)
        size += sum(len(name) + len(value) for name, value in call.request.raw_headers)
        if size > self._limits.headers:
            raise ProxyError(
                "headers_too_large",
                f"the headers are larger than {self._limits.headers} bytes; send less, "
                "or raise limits.headers",
            )

    # --- answered here ---------------------------------------------------------------

    def _models(self) -> bytes:
        catalog = self._fleet.catalog
        if self._listing is None or self._listing[0] is not catalog:
            listing = {"object": "list", "data": catalog.listing(self._created)}
            self._listing = (catalog, orjson.dumps(listing))
        return self._listing[1]

    def _model(self, endpoint: Endpoint) -> bytes:
        catalog, name = self._fleet.catalog, endpoint.name or ""
        entry = catalog.entry(name, self._created)
        if entry is None:
            raise catalog.unknown(name)
        return orjson.dumps(entry)

    def _ready(self, call: Call) -> web.Response:
        if self.draining:
            raise ProxyError("draining", "the proxy is shutting down; use another replica")
        if not self._fleet.ready:
            raise ProxyError("no_upstream", "no upstream answers its health check; see the log")
        return self._local(call, b'{"status":"ready"}')

    def _local(
        self, call: Call, body: bytes, *, content_type: str = "application/json"
    ) -> web.Response:
        headers = {"content-type": content_type, "x-request-id": call.id, "server": "lora-proxy"}
        return web.Response(body=body, headers=headers)

    def refuse(self, call: Call, error: ProxyError) -> web.Response:
        """The proxy's own error, in the shape of the client's API."""
        call.code = str(error.status)
        headers = {
            "content-type": "application/json",
            "server": "lora-proxy",
            "x-request-id": call.id,
            "x-lora-proxy-error": error.code,
        }
        if error.retry_after is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after)))
        if error.allow:
            headers["allow"] = error.allow
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if error.source != "client":
            log.warning("request %s: %s: %s", call.id, error.code, error.message)
        body = orjson.dumps(error.body(call.api))
        answer = web.Response(status=error.status, body=body, headers=headers)
        if not call.request.content.is_eof():  # the rest of a body that nobody will read
            answer.force_close()
        return answer

    # --- peek, resolve, route --------------------------------------------------------

    async def _forwarded(self, call: Call, endpoint: Endpoint) -> web.StreamResponse:
        body = await read_body(call.request, self._limits.body, self._limits.silence)
        peeked = self._peek(call.request, endpoint, body)
        target = None  # an upload, or a path that may know no model
        if peeked is not None and (peeked.model or endpoint.kind is Kind.INFERENCE):
            target = self._fleet.catalog.resolve(peeked.model)
            call.adapter = target.name
        choices = await self._fleet.route(target)
        for number, choice in enumerate(choices, 1):
            try:
                return await self._tried(call, endpoint, choice, peeked, body)
            except ProxyError as error:
                if error.code == "upstream_connect":
                    choice.member.failed(error)
                if not error.replayable or number == len(choices):
                    raise
                self._metrics.retries(choice.member.name, error.code).inc()
                log.info("request %s: %s; trying the next upstream", call.id, error.message)
        raise AssertionError("route() gives at least one choice")

    def _peek(
        self, request: web.BaseRequest, endpoint: Endpoint, body: bytes
    ) -> rewrite.Peek | None:
        """What a body says about its model; None where it is not JSON.

        Inference paths take JSON, but for uploads. On paths that we do not know, a body is
        JSON if it is said to be, or nothing is said: so FastAPI, and vLLM, read it.
        """
        kind = request.headers.get("content-type", "json").partition(";")[0].lower()
        if kind.startswith("multipart/"):
            return None
        if endpoint.kind is Kind.OTHER and not (body and kind.endswith("json")):
            return None
        peeked = rewrite.peek(body)
        return peeked if self._limits.chat_template else rewrite.without_template(peeked)

    # --- lease, forward --------------------------------------------------------------

    async def _tried(
        self,
        call: Call,
        endpoint: Endpoint,
        choice: Choice,
        peeked: rewrite.Peek | None,
        body: bytes,
    ) -> web.StreamResponse:
        """One candidate; a second time if it turns out to have forgotten the adapter."""
        call.upstream = choice.member.name
        self._metrics.decisions(choice.tier.label).inc()
        for healed in (False, True):
            lease = await choice.lease()
            try:
                data = _written(lease, choice.target, peeked, body)
                response = await self._sent(call, endpoint, lease.member, data)
                try:
                    public = _public(choice.target, peeked)
                    error = await _error_body(response) if choice.target else None
                    if error is not None and not healed and self._forgot(lease, response, error):
                        # Loaded again, it must not get new weights under its old name.
                        choice = await self._fleet.renewed(choice)
                        continue
                    return await self._relay(call, response, lease.model, public, error)
                finally:
                    response.close()
            finally:
                lease.release()
        raise AssertionError("the second round always returns")

    def _forgot(self, lease: Lease, response: Response, error: bytes) -> bool:
        """The upstream does not know an adapter that we hold for resident."""
        if not vllm.is_unknown_model(response.status, error, lease.model) or not lease.lost():
            return False
        self._metrics.retries(lease.member.name, "adapter_lost").inc()
        return True

    async def _sent(self, call: Call, endpoint: Endpoint, member: Member, body: bytes) -> Response:
        request = call.request
        headers = rewrite.upstream_headers(
            list(request.raw_headers),
            host=member.pool.authority,
            request_id=call.id.encode(),
            authorization=self._authorizations.get(member.name),
            length=len(body) if body or request.method == "POST" else None,
        )
        target = f"{endpoint.path}?{call.query}" if call.query else endpoint.path
        return await member.pool.request(request.method.encode(), target.encode(), headers, body)

    # --- relay -----------------------------------------------------------------------

    async def _relay(
        self, call: Call, response: Response, served: str, public: str, body: bytes | None
    ) -> web.StreamResponse:
        """Sends the answer on, with the public name put back.

        Args:
            call: The request.
            response: Its head has been read.
            served: What the upstream calls the model; "" where there is none.
            public: What the client calls it.
            body: The whole body, where it has been read already.
        """
        content_type = _header(response.headers, b"content-type").lower()
        is_json = content_type.startswith(b"application/json")
        is_events = content_type.startswith(b"text/event-stream")
        encoded = _header(response.headers, b"content-encoding").lower() not in (b"", b"identity")
        named = bool(served) and served != public and (is_json or is_events) and not encoded
        restorer = rewrite.Restorer(served, public) if named else None
        if body is None and is_json and call.request.method != "HEAD":
            body = await response.read_all(WHOLE)
        if body is not None:
            if restorer is not None:
                body = restorer.feed(body) + restorer.flush()
                if response.status >= 400:
                    body = rewrite.restore_text(body, served, public)
            return self._whole(call, response, body)
        return await self._streamed(call, response, restorer, is_events=is_events)

    def _whole(self, call: Call, response: Response, body: bytes) -> web.Response:
        headers = self._client_headers(call, response, keep_length=False)
        return web.Response(
            status=response.status, reason=_text(response.reason), headers=headers, body=body
        )

    async def _streamed(
        self,
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
            headers=self._client_headers(
                call, response, keep_length=restorer is None and not is_events
            ),
        )
        await answer.prepare(call.request)
        tail = b"\n\n"
        try:
            while data := await response.read():
                if restorer is not None and not (data := restorer.feed(data)):
                    continue
                if is_events and not call.first_byte:
                    call.first_byte = self._now()
                await answer.write(data)
                tail = (tail + data)[-4:]
        except ProxyError as error:
            await self._broken(call, answer, error, at_boundary=is_events and _ends_event(tail))
            return answer
        if restorer is not None and (rest := restorer.flush()):
            await answer.write(rest)
        await answer.write_eof()
        return answer

    async def _broken(
        self, call: Call, answer: web.StreamResponse, error: ProxyError, *, at_boundary: bool
    ) -> None:
        """The upstream failed in the middle of an answer."""
        log.warning("request %s: broken off: %s: %s", call.id, error.code, error.message)
        call.code = str(error.status)  # what it would have been, had the failure come sooner
        if at_boundary:
            event = b"event: error\n" if call.api == "anthropic" else b""
            data = orjson.dumps(error.body(call.api))
            await answer.write(event + b"data: " + data + b"\n\n")
            await answer.write_eof()
        else:
            _abort(call.request)

    def _client_headers(
        self, call: Call, response: Response, *, keep_length: bool
    ) -> CIMultiDict[str]:
        fields = rewrite.client_headers(
            response.headers, request_id=call.id.encode(), keep_length=keep_length
        )
        headers = CIMultiDict((_text(name), _text(value)) for name, value in fields)
        headers["server"] = "lora-proxy"
        return headers

    # --- finish ----------------------------------------------------------------------

    def _finish(self, call: Call) -> None:
        """Always, exactly once: metrics and log. Leases are given back where they were had."""
        taken = self._now() - call.started
        metrics = self._metrics
        metrics.requests(call.adapter, call.upstream, call.endpoint, call.code).inc()
        metrics.duration(call.adapter).observe(taken)
        if call.first_byte:
            metrics.first_token(call.adapter).observe(call.first_byte - call.started)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "%s %s %s adapter=%s upstream=%s %.1f ms id=%s",
                call.request.method,
                call.path,
                call.code,
                call.adapter,
                call.upstream,
                taken * 1000,
                call.id,
            )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _api(path: str) -> Api:
    """Whose error shape the clients of a path understand."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def _written(
    lease: Lease, target: Target | None, peeked: rewrite.Peek | None, body: bytes
) -> bytes:
    """The body for the upstream: the served name, and the adapter's fields."""
    if peeked is None:
        return body
    if target is None:
        return rewrite.unnamed(peeked, body)
    if isinstance(target, Adapter):
        return rewrite.write(peeked, body, lease.model, target.defaults, target.overrides)
    return rewrite.write(peeked, body, lease.model)


def _public(target: Target | None, peeked: rewrite.Peek | None) -> str:
    """What answers call the model: the client's word, if that is one of the target's names.

    Not what else a client wrote where `default_model` answers: its size has no bound, and
    it would be repeated in every event and remembered by the restorer.
    """
    if target is None or peeked is None:
        return ""
    if isinstance(target, Adapter) and peeked.model in target.aliases:
        return peeked.model
    return target.name


def _abort(request: web.BaseRequest) -> None:
    """Cuts the client off, so that it cannot take what it has for the whole."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:
        # Here a plain close would be the proper end of the body; a reset is not.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _error_body(response: Response) -> bytes | None:
    """The body of an error answer, which is small and may speak of the model; else None."""
    return await response.read_all(WHOLE) if response.status >= 400 else None


def _ends_event(tail: bytes) -> bool:
    return tail.endswith((b"\n\n", b"\r\n\r\n"))


def _header(headers: Headers, name: bytes) -> bytes:
    for key, value in headers:
        if key.lower() == name:
            return value
    return b""


def _text(data: bytes) -> str:
    """Header bytes as aiohttp wants them: UTF-8, else each byte for itself."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
