"""A whole proxy in the test's own event loop, in front of fakes, and proof that it leaves nothing.

    async with proxied(fake, adapters={"sql": "/adapters/sql"}, load_timeout=1.0) as p:
        answer = await p.ask("sql")

Owns how a test starts a proxy and what must hold when it has ended; refuses to know what is
tested. Tests speak HTTP to `p.url` and look inside through `p.app.fleet` only, so that they
hold for every front end: the `proxied` fixture chooses it.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

import lora_proxy
from lora_proxy.app import App
from lora_proxy.member import Member
from lora_proxy.server import Protocol as ClientConnection
from lora_proxy.settings import Limits, Listen, Settings, Timeouts, UpstreamSettings
from lora_proxy.types import Adapter

PACKAGE = str(Path(lora_proxy.__file__).parent)
PATIENCE = 20.0  # seconds until a test that waits for something is taken for failed

ADAPTERS = {"sql": "/adapters/sql", "pirate": "/adapters/pirate"}
CHAT = "/v1/chat/completions"


class Server(Protocol):
    """A fake, or a server of raw bytes."""

    @property
    def url(self) -> str: ...


async def until(true: Callable[[], object], what: str = "what the test waits for") -> None:
    """Returns once `true()`, which something outside of the test's hands brings about."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not true():  # noqa: ASYNC110  # most of what is waited for has no event
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"{what} did not come about") from None


@dataclass(frozen=True, slots=True)
class Answer:
    """One response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error that the proxy made."""
        return self.headers["x-lora-proxy-error"]


@dataclass(slots=True)
class Proxied:
    """A running proxy.

    Attributes:
        app: To be looked into through `fleet` only.
        session: A client that keeps connections.
        faults: What was logged as an error, or came to nobody's attention, so far. It must be
            empty in the end: a test that provokes one takes it out.
    """

    app: App
    session: aiohttp.ClientSession
    faults: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.app.url

    @property
    def members(self) -> Sequence[Member]:
        return tuple(self.app.fleet.members.values())

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str) -> Answer:
        return await self.request("GET", path)

    async def post(self, path: str, body: object, **options: Any) -> Answer:
        """Posts bytes as they are, or anything else as JSON."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        return await self.request("POST", path, data=BytesIO(data), headers=headers, **options)

    async def ask(self, model: object, prompt: str = "hi", **fields: object) -> Answer:
        """Asks a chat question."""
        return await self.post(CHAT, chat(model, prompt, **fields))

    async def raw(self, data: bytes) -> bytes:
        """Everything that one connection answers to these bytes until the proxy closes it."""
        async with self.connected() as (reader, writer):
            writer.write(data)
            async with asyncio.timeout(PATIENCE):
                return await reader.read()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A client's connection, byte by byte."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """The values of one metric by its label values, in the order of their names."""
        text = (await self.get("/metrics")).body.decode()
        return {
            tuple(sample.labels[label] for label in sorted(sample.labels)): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    async def idle(self) -> None:
        """Waits until nothing is under way and no lease is held."""
        for member in self.members:
            await until(lambda m=member: not member_holds(m), f"an idle {member.name}")


def chat(model: object, prompt: str = "hi", **fields: object) -> dict[str, object]:
    """A chat question as a client writes it."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}


def http(path: str, body: bytes = b"", *headers: str, method: str = "POST") -> bytes:
    """A whole request for `Proxied.raw`; the connection is to be closed after it."""
    lines = [f"{method} {path} HTTP/1.1", "host: proxy", "connection: close", *headers]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def parsed(raw: bytes) -> Answer:
    """The one response in these bytes; its body stays in its transfer coding."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(": ") for line in lines)
    return Answer(int(status.split(" ")[1]), {k.lower(): v for k, _, v in fields}, body)


def member_holds(member: Member) -> list[str]:
    """What requests still have of one upstream."""
    held = {
        "requests": member.in_flight,
        "labels": sum(map(abs, member.active.values())),
        "waiters": member.slots.waiting + len(member._waiting),
        "leases": member.slots.busy + len(member.slots._leases),
        "connections": len(member.pool.connections) - len(member.pool.idle),
    }
    return [f"{count} {what}" for what, count in held.items() if count]


@asynccontextmanager
async def proxied(
    *servers: Server | str,
    adapters: Mapping[str, str] | Sequence[Adapter] = ADAPTERS,  # type: ignore[assignment]  # str
    upstream: Mapping[str, object] | None = None,
    timeouts: Mapping[str, float] | None = None,
    limits: Mapping[str, int] | None = None,
    probe_interval: float = 3600.0,
    watch_interval: float = 0.0,
    **settings: Any,
) -> AsyncIterator[Proxied]:
    """Runs a proxy, and asserts in the end that it has left nothing behind.

    Args:
        servers: The upstreams `gpu-0`, `gpu-1` and so on, or their URLs.
        adapters: Name -> path, or entries of the registry.
        upstream: Further settings of every upstream.
        timeouts: Of `config.Timeouts`.
        limits: Of `config.Limits`.
        probe_interval: By default there is only the probe at the start.
        watch_interval: By default nobody looks at files unasked.
        settings: Of `config.Settings`.
    """
    entries = (
        tuple(Adapter(name, path) for name, path in adapters.items())
        if isinstance(adapters, Mapping)
        else tuple(adapters)
    )
    extra: dict[str, Any] = dict(upstream or {})
    if "api_key" in extra:
        extra["api_key"] = SecretStr(extra["api_key"])
    urls = [server if isinstance(server, str) else server.url for server in servers]
    app = App(
        Settings(
            listen=Listen("127.0.0.1", 0),
            upstreams=tuple(
                UpstreamSettings(name=f"gpu-{number}", url=url, **extra)
                for number, url in enumerate(urls)
            ),
            adapters=entries,
            timeouts=Timeouts(**dict(timeouts or {})),
            limits=Limits(**dict(limits or {})),
            probe_interval=probe_interval,
            watch_interval=watch_interval,
            **settings,
        )
    )
    faults: list[str] = []
    gc.freeze()  # the look for garbage at the end is then at this test's only, and quick
    _running.add(app)
    with _overheard(faults):
        try:
            await app.start()
            async with aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=PATIENCE),
                connector=aiohttp.TCPConnector(limit=0),
            ) as session:
                started = Proxied(app, session, faults)
                yield started
            await started.idle()
        finally:
            await app.stop()
            _running.discard(app)
        await _assert_nothing_left(app)
        gc.unfreeze()
    assert not faults, "\n".join(faults)


Start = Callable[..., AbstractAsyncContextManager[Proxied]]
"""What the `proxied` fixture is."""


_running: set[App] = set()


async def _assert_nothing_left(app: App) -> None:
    for member in app.fleet.members.values():
        assert not member_holds(member), member.name
        assert not member.pool.connections, f"{member.name} has open connections"
    assert len(app.fleet._shared.tasks) == 0
    if not _running:
        await until(lambda: not _tasks_of_ours(), "the end of every task")
    gc.collect()  # what nobody looked at complains when it goes
    await asyncio.sleep(0)


def _tasks_of_ours() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if _is_ours(task)]


def _is_ours(task: asyncio.Task[Any]) -> bool:
    coroutine: Any = task.get_coro()
    frame = getattr(coroutine, "cr_frame", None)
    if frame is None:
        return False
    return frame.f_code.co_filename.startswith(PACKAGE) or isinstance(
        frame.f_locals.get("self"), ClientConnection
    )


class _overheard(logging.Handler):  # noqa: N801  # used as a function
    """Collects errors in the log, and what asyncio reports because nobody looked."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.addFilter(lambda record: record.name.startswith(("lora_proxy", "asyncio")))
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        self._faults.append(logging.Formatter().format(record))

    def __enter__(self) -> None:
        logging.getLogger().addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
