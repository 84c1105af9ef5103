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
import random
import re
import time
from dataclasses import dataclass
from itertools import count

import orjson
from aiohttp import web

from lora_proxy import access, rewrite
from lora_proxy.access import Endpoint, Keys, Kind
from lora_proxy.body import read_body
from lora_proxy.call import CLIENT_LEFT, Call, api_of
from lora_proxy.catalog import Catalog, Target
from lora_proxy.errors import ProxyError
from lora_proxy.fleet import Fleet
from lora_proxy.forward import STARTED, Forwarder, Question
from lora_proxy.metrics import CONTENT_TYPE, Metrics
from lora_proxy.relay import abort
from lora_proxy.types import Adapter, Route

log = logging.getLogger(__name__)

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
        prefixes: The routing policy wants to know how a conversation begins.
    """

    body: int
    headers: int
    silence: float
    strict_paths: bool
    chat_template: bool
    prefixes: bool


class Proxy:
    """aiohttp's request handler.

    Args:
        fleet: Started.
        metrics: Shared with the fleet.
        forwarder: Asks the fleet.
        limits: What clients may ask.
        keys: Who may ask.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        forwarder: Forwarder,
        limits: Limits,
        keys: Keys,
    ) -> None:
        self.draining = False
        self._fleet = fleet
        self._metrics = metrics
        self._limits = limits
        self._keys = keys
        self._forwarder = forwarder
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
                abort(request)
                raise ConnectionAbortedError("the answer had begun") from error
            message = f"the proxy failed; its log says more under request id {call.id}"
            answer = self.refuse(call, ProxyError("internal_error", message))
        else:
            if call.code == CLIENT_LEFT:
                call.code = str(answer.status)
        finally:
            self._finish(call)
        if self.draining and not answer.prepared:
            answer.force_close()  # the client's next request is for another replica
        return answer

    # --- admit -----------------------------------------------------------------------

    def _request_id(self, request: web.BaseRequest) -> str:
        """The client's, if it is one token of printable ASCII; else a new one."""
        given = request.headers.get("x-request-id", "")
        return given if _REQUEST_ID.match(given) else f"{self._id_prefix}-{next(self._ids):x}"

    async def _answer(self, call: Call) -> web.StreamResponse:
        endpoint = access.endpoint(call.request.method, call.path, strict=self._limits.strict_paths)
        call.endpoint, call.api = endpoint.label, api_of(endpoint.path)
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

    # --- peek, resolve -----------------------------------------------------------------

    async def _forwarded(self, call: Call, endpoint: Endpoint) -> web.StreamResponse:
        body = await read_body(call.request, self._limits.body, self._limits.silence)
        peeked = self._peek(call.request, endpoint, body)
        if peeked is None or not (peeked.model or endpoint.kind is Kind.INFERENCE):
            # An upload, or a path that may know no model.
            return await self._forwarder.answer(call, Question(endpoint, peeked, body, ""), None)
        target = self._fleet.catalog.resolve(peeked.model)
        public = _public(target, peeked.model)
        prefix = rewrite.prefix(peeked) if self._limits.prefixes else b""
        question = Question(endpoint, peeked, body, public, prefix)
        if isinstance(target, Route):
            return await self._routed(call, question, target, peeked)
        call.adapter = target.name
        return await self._forwarder.answer(call, question, target)

    async def _routed(
        self, call: Call, question: Question, route: Route, peeked: rewrite.Peek
    ) -> web.StreamResponse:
        """The split's choice, then the fallbacks while nothing has been sent."""
        catalog = self._fleet.catalog
        models = catalog.pick(route, _sticky(call, route, peeked), random.random())  # noqa: S311
        copy = catalog.mirror_of(route, random.random())  # noqa: S311  # neither is a secret
        if copy is not None:
            self._forwarder.mirror(call, question, copy)
        for number, model in enumerate(models, 1):
            call.adapter = model.name
            try:
                return await self._forwarder.answer(call, question, model)
            except ProxyError as error:
                if number == len(models) or error.source == "client" or error.code in STARTED:
                    raise
                self._metrics.retries(call.upstream, "fallback").inc()
                log.info("request %s: %s; falling back", call.id, error.message)
        raise ProxyError("no_upstream", f"route '{route.name}' leads to no model that is served")

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


def _public(target: Target, asked: str | None) -> str:
    """What answers call the model: the client's word, if that is one of the target's names.

    Not what else a client wrote where `default_model` answers: its size has no bound, and
    it would be repeated in every event and remembered by the restorer.
    """
    if isinstance(target, Adapter) and asked in target.aliases:
        return asked
    return target.name


def _sticky(call: Call, route: Route, peeked: rewrite.Peek) -> bytes | None:
    """What keeps this client on its target; None for nothing."""
    if route.sticky is None:
        return None
    if route.sticky == "user":
        user = peeked.fields.get("user")
        return None if user is None else bytes(user)
    return call.request.headers.get(route.sticky, "").encode() or None
