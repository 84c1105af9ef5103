"""A vLLM server without a model: the same answers, at once, and any fault on demand.

Owns the state of one server (its adapters, its running requests) and vLLM's control API. What
an answer looks like is `fake_answers`', what can go wrong `fake_faults`'; a server that speaks
no HTTP at all is `raw_server`'s. test_contract.py holds this one against a real vLLM.

    async with FakeVllm() as fake:
        fake.disk["/adapters/big"] = OnDisk(rank=128)  # every other path holds a good adapter
        fake.load_gate.shut()                          # loads wait from now on
        ...
        await fake.until(lambda: fake.load_gate.waiting == 1)
        fake.load_gate.open()
        fake.inject(Reply(503, b"busy"), path="/v1/chat/completions", times=2)

Tests wait with `until`, never with a sleep.
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Literal, Self

import fake_answers as answers
import orjson
from aiohttp import web
from fake_answers import Json
from fake_faults import CLOSE, HANG, Cut, Fault, Gate, Raw, Reply, Signal
from multidict import CIMultiDict, CIMultiDictProxy

GOOD_RANK = 8
CHAT_TEMPLATE_REFUSED = (
    "Chat template is passed with request, but --trust-request-chat-template is not set. "
    "Refused request with untrusted chat template."
)

# What vLLM's worker says to adapters that it cannot use: `OnDisk(refusal=REFUSALS["dora"])`.
REFUSALS = {
    "corrupt": "Error while deserializing header: header too large",
    "truncated": ("Error while deserializing header: incomplete metadata, file not fully covered"),
    "dora": "vLLM does not yet support DoRA.",
    "modules_to_save": (
        'vLLM only supports modules_to_save being either None or ["classifier", "score"] for '
        "classification models. Unsupported modules_to_save: ['lm_head']"
    ),
    "no_weights": "/adapters/no_weights doesn't contain tensors",
    "wrong_shape": (
        "The size of tensor a (64) must match the size of tensor b (128) "
        "at non-singleton dimension 1"
    ),
}


__all__ = ["CLOSE", "HANG", "REFUSALS", "Cut", "FakeVllm", "OnDisk", "Raw", "Reply", "Seen"]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What lies at a path that a load may name.

    Attributes:
        rank: The adapter's rank.
        refusal: What the worker says instead of loading it.
    """

    rank: int = GOOD_RANK
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it arrived; `path` is raw, with its query."""

    method: str
    path: str
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        parsed = orjson.loads(self.body)
        assert isinstance(parsed, dict)
        return parsed


# --- the server ----------------------------------------------------------------------------

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class _Injected:
    fault: Fault
    path: str | None
    left: float


class FakeVllm:
    """One fake vLLM server on 127.0.0.1.

    Args:
        base: The base model's name.
        base_root: The base model's folder.
        lora_modules: Adapters that it has from the start, and again after a restart.
        max_loras: Only told in the metrics.
        max_lora_rank: The highest rank it loads.
        max_model_len: Told by `/v1/models`.
        enable_lora: False is a server without --enable-lora.
        runtime_updating: False is one without VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        port: A free one by default; kept over `stop` and `start`.

    Attributes:
        disk: What lies at a path; None is nothing. Paths not named hold a good adapter.
        loras: The adapters it knows, name to path; a test may change it, as another actor would.
        requests: Everything that arrived, in order, faults included.
        loads: Every load call that had a name and a path, in order.
        unloads: Every name that was asked to be unloaded, in order.
        running: Generations under way.
        aborted: Generations whose client went away.
        connections: Connections accepted so far.
        load_gate: Passed by each load before its adapter is known.
        answer_gate: Passed by each generation before its answer begins.
        stream_gate: Passed by each write of a body that is sent in pieces.
        split: Bodies are sent in pieces of so many bytes, each a chunk of its own.
        hang_up: After each answer the connection is closed: `announced` by a header, or not.
        accepting: False closes every new connection at once.
    """

    def __init__(
        self,
        *,
        base: str = "tiny",
        base_root: str = "/models/tiny",
        lora_modules: Mapping[str, str] = MappingProxyType({}),
        max_loras: int = 2,
        max_lora_rank: int = 64,
        max_model_len: int = 4096,
        enable_lora: bool = True,
        runtime_updating: bool = True,
        port: int = 0,
    ) -> None:
        self.base = base
        self.port = port
        self.disk: dict[str, OnDisk | None] = {}
        self.loras = dict(lora_modules)
        self.requests: list[Seen] = []
        self.loads: list[tuple[str, str]] = []
        self.unloads: list[str] = []
        self.running = 0
        self.aborted = 0
        self.connections = 0
        self.split: int | None = None
        self.hang_up: Literal["announced", "silent"] | None = None
        self.accepting = True

        self._signal = Signal()
        self.load_gate = Gate(self._signal)
        self.answer_gate = Gate(self._signal)
        self.stream_gate = Gate(self._signal)

        self._base_root = base_root
        self._lora_modules = dict(lora_modules)
        self._max_loras = max_loras
        self._max_lora_rank = max_lora_rank
        self._max_model_len = max_model_len
        self._enable_lora = enable_lora
        self._runtime_updating = runtime_updating

        self._faults: list[_Injected] = []
        self._rivals: dict[str, str] = {}
        self._name_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._ids = count(1)
        self._using: list[str] = []
        self._lora_info: dict[str, float] = {}
        self._loading: set[asyncio.Task[web.Response]] = set()
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None

    # what a test asks

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def lora_names(self) -> list[str]:
        return list(self.loras)

    def requests_to(self, path: str) -> list[Seen]:
        """The requests for this path, whatever their query."""
        return [seen for seen in self.requests if seen.path.partition("?")[0] == path]

    async def until(self, true: Callable[[], bool]) -> None:
        """Returns once `true()`; it is asked again whenever something happens here."""
        await self._signal.until(true)

    # what a test does to it

    def inject(self, fault: Fault, *, path: str | None = None, times: float = float("inf")) -> None:
        """Sets a fault for the next requests, for those to `path` if it is given.

        The oldest fault that fits a request is the one it meets.
        """
        self._faults.append(_Injected(fault, path, times))

    def clear_faults(self) -> None:
        self._faults.clear()

    def add_rival(self, name: str, path: str) -> None:
        """Another actor loads `name` from `path` just before the next load call for it."""
        self._rivals[name] = path

    def drop_connections(self) -> None:
        """Closes every open connection now, in use or idle."""
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    def restart(self, *, drop_connections: bool = True) -> None:
        """Forgets every adapter that was loaded at run time, as a new process does."""
        self.loras = dict(self._lora_modules)
        if drop_connections:
            self.drop_connections()

    async def start(self) -> None:
        """Listens; after a `stop` on the same port again."""
        self._runner = web.AppRunner(
            self._application(), handler_cancellation=True, shutdown_timeout=1.0, access_log=None
        )
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._protocol, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Closes everything: connections break, new ones are refused."""
        assert self._runner is not None, "it was not started"
        assert self._listener is not None, "it was not started"
        self._listener.close()
        self.drop_connections()
        for task in self._loading:
            task.cancel()
        await asyncio.gather(*self._loading, return_exceptions=True)
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # the way of a request

    def _application(self) -> web.Application:
        routes: list[tuple[str, str, _Handler]] = [
            ("GET", "/health", self._health),
            ("GET", "/version", self._version),
            ("GET", "/metrics", self._metrics),
            ("GET", "/v1/models", self._models),
            *(("POST", path, self._infer) for path in answers.ENDPOINTS),
        ]
        if self._runtime_updating:
            routes.append(("POST", "/v1/load_lora_adapter", self._load))
            routes.append(("POST", "/v1/unload_lora_adapter", self._unload))
        application = web.Application(middlewares=[self._serve], client_max_size=1 << 30)
        for method, path, handler in routes:
            application.router.add_route(method, path, handler)
        return application

    def _protocol(self) -> asyncio.Protocol:
        self.connections += 1
        self._signal.changed()
        assert self._runner is not None
        assert self._runner.server is not None
        return self._runner.server() if self.accepting else _HangUp()

    @web.middleware
    async def _serve(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        body = await request.read()
        self.requests.append(Seen(request.method, request.raw_path, request.headers, body))
        self._signal.changed()
        match self._take_fault(request.path):
            case Reply() as reply:
                return _reply(reply)
            case Raw() as raw:
                return await _say(raw, request)
            case Cut(after):
                request[CUT] = after
        try:
            response = await handler(request)
        except web.HTTPException as error:
            allow = {"allow": error.headers["Allow"]} if error.status == 405 else {}
            response = _json({"detail": error.reason}, error.status, allow)
        return await self._end(request, response)

    async def _end(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        if self.split is not None and isinstance(response, web.Response) and response.body:
            response = await self._in_pieces(request, response)
        if self.hang_up == "announced":
            response.force_close()
        elif self.hang_up == "silent":
            await response.prepare(request)
            await response.write_eof()
            _close(request)
        return response

    def _take_fault(self, path: str) -> Fault | None:
        for injected in self._faults:
            if injected.path in (None, path):
                injected.left -= 1
                if injected.left <= 0:
                    self._faults.remove(injected)
                return injected.fault
        return None

    # generation

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        """Answers on every inference path. In vLLM's order: body, model, chat template."""
        path = request.path
        endpoint = answers.ENDPOINTS[path]
        body = await _body(request)
        if isinstance(body, web.Response):
            return body
        if fault := _invalid_model(body, required=endpoint.model_required):
            return _json(fault, 400)
        asked = body.get(endpoint.asks, body.get("messages") if path == "/tokenize" else None)
        if asked is None:
            return _json(answers.missing(endpoint.asks, body), 400)
        model = body.get("model") or self.base
        assert isinstance(model, str)
        if model != self.base and model not in self.loras:
            return self._no_such_model(path, model)
        if "chat_template" in body:
            return _json(answers.error(400, CHAT_TEMPLATE_REFUSED, "BadRequestError"), 400)

        made = self._generate(request, body, endpoint, model, answers.question(asked))
        with self._counted(model):
            await self.answer_gate.passage()
            if body.get("stream") is True and endpoint.events is not None:
                return await self._stream(request, endpoint.events(made, body), EVENT_STREAM)
            return _json(endpoint.whole(made))

    def _generate(
        self,
        request: web.Request,
        body: Json,
        endpoint: answers.Endpoint,
        model: str,
        prompt: str,
    ) -> answers.Generation:
        limit = body.get(endpoint.limit) or body.get("max_completion_tokens") or 1024
        assert isinstance(limit, int)
        name = request.headers.get("x-request-id") or f"{next(self._ids):016x}"
        endless = body.get("ignore_eos") is True
        return answers.generate(name, model, prompt, limit, endless=endless)

    def _no_such_model(self, path: str, model: str) -> web.Response:
        text = f"The model `{model}` does not exist. Valid aliases: {self.base}."
        if path.startswith("/v1/messages"):
            return _json(answers.anthropic_error(text, "NotFoundError"), 404)
        return _json(answers.error(404, text, "NotFoundError", "model"), 404)

    @contextlib.contextmanager
    def _counted(self, model: str) -> Iterator[None]:
        self.running += 1
        self._using.append(model)
        self._note_loras()
        try:
            yield
        except BaseException:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            self._using.remove(model)
            self._note_loras()
            self._signal.changed()

    async def _stream(
        self, request: web.Request, pieces: Iterator[bytes], headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=HEADERS | headers)
        await response.prepare(request)
        for written, piece in enumerate(_cut(pieces, self.split)):
            if written == request.get(CUT):
                _close(request)
                break
            await self.stream_gate.passage()
            await response.write(piece)
        return response

    async def _in_pieces(self, request: web.Request, response: web.Response) -> web.StreamResponse:
        assert isinstance(response.body, bytes)
        headers = {"content-type": response.headers.get("content-type", "text/plain")}
        return await self._stream(request, iter([response.body]), headers)

    # the control API

    async def _load(self, request: web.Request) -> web.Response:
        """Loads an adapter. The call goes on to its end when its client goes away."""
        body = await _body(request)
        if isinstance(body, web.Response):
            return body
        for wanted in ("lora_name", "lora_path"):
            if wanted not in body:
                return _json(answers.missing(wanted, body), 400)
        name, path = str(body["lora_name"]), str(body["lora_path"])
        if not name or not path:
            return _refusal("Both 'lora_name' and 'lora_path' must be provided.")
        self.loads.append((name, path))
        self._signal.changed()
        task = asyncio.create_task(self._load_alone(name, path))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
        return await asyncio.shield(task)

    async def _load_alone(self, name: str, path: str) -> web.Response:
        """One load at a time for each name: the others find it loaded."""
        async with self._name_locks[name]:
            if name in self._rivals:
                self.loras[name] = self._rivals.pop(name)
            if name == self.base:
                return _refusal(f"The lora adapter '{name}' conflicts with a served base model.")
            if name in self.loras:
                return _refusal(
                    f"The lora adapter '{name}' has already been loaded. If you want to load "
                    "the adapter in place, set 'load_inplace' to True."
                )
            await self.load_gate.passage()
            found = self.disk.get(path, OnDisk())
            if self._enable_lora and found is None:
                text = f"Loading lora {name} failed: No adapter found for {path}"
                return _json(answers.error(404, text, "NotFoundError"), 404)
            if reason := self._worker_refusal(found):
                text = (
                    f"Call to add_lora method failed: Worker failed with error '{reason}', "
                    "please check the stack trace above for the root cause"
                )
                return _json(answers.error(500, text, "InternalServerError"), 500)
            self.loras[name] = path
            self._signal.changed()
            return _text(f"Success: LoRA adapter '{name}' added successfully.")

    def _worker_refusal(self, found: OnDisk | None) -> str | None:
        if not self._enable_lora or found is None:
            return "LoRA is not enabled. Use --enable-lora to enable LoRA."
        if found.rank > self._max_lora_rank:
            return f"LoRA rank {found.rank} is greater than max_lora_rank {self._max_lora_rank}."
        return found.refusal

    async def _unload(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if isinstance(body, web.Response):
            return body
        if "lora_name" not in body:
            return _json(answers.missing("lora_name", body), 400)
        name = str(body["lora_name"])
        if not name:
            return _refusal("'lora_name' needs to be provided to unload a LoRA adapter.")
        self.unloads.append(name)
        self._signal.changed()
        if self.loras.pop(name, None) is None:
            text = f"The lora adapter '{name}' cannot be found."
            return _json(answers.error(404, text, "NotFoundError"), 404)
        return _text(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _models(self, _request: web.Request) -> web.Response:
        cards = [answers.card(self.base, self._base_root, None, self._max_model_len)]
        cards += [answers.card(name, path, self.base, None) for name, path in self.loras.items()]
        return _json({"object": "list", "data": cards})

    # its state of health

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(headers=HEADERS)

    async def _version(self, _request: web.Request) -> web.Response:
        return _json({"version": "0.32.0"})

    async def _metrics(self, _request: web.Request) -> web.Response:
        lines = [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{engine="0",model_name="{self.base}"}} {self.running:.1f}',
            "# HELP vllm:lora_requests_info Running stats on lora requests.",
            "# TYPE vllm:lora_requests_info gauge",
        ]
        for names, when in self._lora_info.items():
            labels = (
                f'max_lora="{self._max_loras}",running_lora_adapters="{names}",'
                f'waiting_lora_adapters="{names}"'
            )
            lines.append(f"vllm:lora_requests_info{{{labels}}} {when!r}")
        return _text("\n".join([*lines, ""]))

    def _note_loras(self) -> None:
        """One series for each set of names ever in use; its value is when it was so last."""
        if self._enable_lora:
            names = ",".join(sorted({name for name in self._using if name != self.base}))
            self._lora_info[names] = time.time()


# --- small parts ---------------------------------------------------------------------------

CUT = web.RequestKey("cut", int)
HEADERS = {"server": "uvicorn", "vary": "Origin"}
EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8"}


class _HangUp(asyncio.Protocol):
    """Closes its connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _json(value: Json, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    content = {"content-type": "application/json"}
    return web.Response(
        status=status, body=answers.encode(value), headers=HEADERS | content | (headers or {})
    )


def _text(text: str) -> web.Response:
    return web.Response(text=text, headers=HEADERS)


def _refusal(text: str) -> web.Response:
    return _json(answers.error(400, text, "InvalidUserInput"), 400)


def _reply(reply: Reply) -> web.Response:
    headers = CIMultiDict(HEADERS)
    if isinstance(reply.body, bytes):
        body = reply.body
    else:
        body = answers.encode(reply.body)
        headers["content-type"] = "application/json"
    headers.update(reply.headers)
    return web.Response(status=reply.status, body=body, headers=headers)


async def _say(raw: Raw, request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(raw.data)
    if raw.then == "hang":
        await asyncio.Event().wait()  # until the client goes away, or the server stops
    _close(request)
    return web.Response()


def _close(request: web.Request) -> None:
    """Closes the connection after what was written; what the handler returns is not sent."""
    if request.transport is not None:
        request.transport.close()


async def _body(request: web.Request) -> dict[str, object] | web.Response:
    """The JSON object in the body, or what vLLM says if there is none."""
    if request.content_type != "application/json":
        text = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        return _json(answers.error(400, text, "Bad Request"), 400)
    raw = await request.read()
    if not raw:
        return _json(answers.invalid("missing", "body", "Field required", "None"), 400)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _json(answers.invalid_json(), 400)
    if not isinstance(body, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        return _json(answers.invalid("model_attributes_type", "body", text, "<list>"), 400)
    return body


def _invalid_model(body: dict[str, object], *, required: bool) -> Json | None:
    """What is wrong with `model` as a value; whether it names a model is another question."""
    model = body.get("model")
    if required and "model" not in body:
        return answers.missing("model", body)
    if isinstance(model, str):
        if required and not model:
            return answers.invalid(
                "value_error", "body.model", "Value error, Model is required", ""
            )
        return None
    if model is None and not required:
        return None
    return answers.invalid(
        "string_type", "body.model", "Input should be a valid string", str(model)
    )


def _cut(pieces: Iterator[bytes], size: int | None) -> Iterator[bytes]:
    for piece in pieces:
        if size is None:
            yield piece
        else:
            yield from (piece[at : at + size] for at in range(0, len(piece), size))
