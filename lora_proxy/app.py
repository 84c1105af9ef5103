"""The composition root: builds everything from settings, runs it, takes it down.

Nothing else constructs these parts, and nothing here decides anything about a request.
"""

import asyncio
import logging
import signal
import ssl
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress

import aiohttp
from aiohttp import web

from lora_proxy import proxy
from lora_proxy.access import Keys
from lora_proxy.background import Files, Tasks
from lora_proxy.catalog import Catalog
from lora_proxy.connection import Limits
from lora_proxy.fleet import Fleet
from lora_proxy.member import PROBE_TIMEOUT, Member, Shared
from lora_proxy.metrics import Metrics
from lora_proxy.server import Server
from lora_proxy.settings import Settings, UpstreamSettings
from lora_proxy.types import BaseModel
from lora_proxy.upstream import Pool
from lora_proxy.vllm import ControlClient

log = logging.getLogger(__name__)

EXIT_OK, EXIT_CONFIG, EXIT_LISTEN = 0, 2, 1


class ConflictError(Exception):
    """Public names that are a base model's too: `lines` has one fault each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class App:
    """One running proxy.

    Args:
        settings: Validated.

    Attributes:
        fleet: Runtime state; for tests and the admin API to look at.
        url: Where it listens, once started.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Without a limit: a hundred loads that hang must not keep the probes waiting.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._metrics = Metrics()
        shared = Shared(self._metrics, Tasks(), Files(), settings.load_timeout)
        self.fleet = Fleet(
            Catalog.build(settings.adapters, default_model=settings.default_model),
            [self._member(one, shared) for one in settings.upstreams],
            shared,
            probe_interval=settings.probe_interval,
        )
        self._proxy = proxy.Proxy(
            self.fleet,
            self._metrics,
            proxy.Limits(
                body=settings.limits.body,
                headers=settings.limits.headers,
                silence=settings.timeouts.client,
                strict_paths=settings.strict_paths,
                chat_template=settings.allow_chat_template,
            ),
            Keys(key.get_secret_value() for key in settings.api_keys),
            {one.name: _bearer(one) for one in settings.upstreams if one.api_key is not None},
        )
        self._runner = web.ServerRunner(
            Server(self._proxy, header_limit=settings.limits.headers),
            shutdown_timeout=settings.timeouts.drain,
        )
        self.url = ""

    async def start(self) -> None:
        """Asks the upstreams once, then listens.

        Raises:
            ConflictError: An adapter has the name of a base model.
            OSError: The address cannot be listened on.
        """
        await self.fleet.start()
        if conflicts := self.fleet.catalog.conflicts():
            raise ConflictError(conflicts)
        await self._runner.setup()
        listen = self._settings.listen
        site = web.TCPSite(self._runner, listen.host, listen.port, backlog=1024)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def stop(self) -> None:
        """Takes no more requests, lets those under way finish for a while, ends the rest."""
        self._proxy.draining = True
        await self._runner.cleanup()
        await self.fleet.close()
        await self._session.close()

    def _member(self, one: UpstreamSettings, shared: Shared) -> Member:
        timeouts, context = self._settings.timeouts, _tls(one)
        pool = Pool(
            one.name,
            one.url,
            Limits(
                connect=timeouts.connect,
                read=timeouts.read,
                keepalive=timeouts.keepalive,
                headers=self._settings.limits.headers,
            ),
            context,
        )
        control = ControlClient(
            self._session,
            one.url,
            api_key=one.api_key.get_secret_value() if one.api_key else None,
            timeout=PROBE_TIMEOUT,
            load_timeout=self._settings.load_timeout,
            ssl=context if context is not None else True,
        )
        return Member(
            pool,
            control,
            shared,
            capacity=one.max_cpu_loras,
            max_rank=one.max_lora_rank,
            bases=(BaseModel(one.base_model),) if one.base_model else (),
        )


def serve(settings: Settings) -> int:
    """Runs the proxy until SIGTERM or SIGINT.

    Returns:
        The exit status: 0 after a signal, 2 for names that collide with what the
        upstreams serve, 1 if the address cannot be listened on.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("lora_proxy").setLevel(settings.log_level.upper())
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    app = App(settings)
    try:
        await _first(app.start(), stopped)
        if not stopped.is_set():
            log.info("listening on %s", app.url)
            await stopped.wait()
            log.info("stopping; requests under way have %g s", settings.timeouts.drain)
    except ConflictError as error:
        for line in error.lines:
            sys.stderr.write(f"error: {line}\n")
        return EXIT_CONFIG
    except OSError as error:
        sys.stderr.write(f"error: cannot listen on {settings.listen}: {error.strerror}\n")
        return EXIT_LISTEN
    finally:
        await app.stop()
    return EXIT_OK


async def _first(work: Coroutine[None, None, None], stopped: asyncio.Event) -> None:
    """Does the work, unless it is stopped first."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it exists; None is asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415  # not to be had on every platform
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _bearer(one: UpstreamSettings) -> bytes:
    assert one.api_key is not None  # noqa: S101  # asked by the caller
    return b"Bearer " + one.api_key.get_secret_value().encode()


def _tls(one: UpstreamSettings) -> ssl.SSLContext | None:
    """How an https upstream is verified."""
    if not one.url.startswith("https:"):
        return None
    context = ssl.create_default_context(cafile=one.tls.ca_file)
    if not one.tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
