"""The composition root: builds everything from settings, runs it, takes it down.

Nothing else constructs these parts, and nothing here decides anything about a request.
"""

import asyncio
import logging
import signal
import ssl
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict

import aiohttp
from aiohttp import web

from lora_proxy import discovery, proxy
from lora_proxy.access import Keys
from lora_proxy.background import Files, Tasks
from lora_proxy.catalog import Catalog
from lora_proxy.connection import Limits
from lora_proxy.fleet import Fleet, Plan
from lora_proxy.forward import Forwarder, Retry
from lora_proxy.health import Thresholds
from lora_proxy.member import PROBE_TIMEOUT, Member, Shared
from lora_proxy.metrics import Metrics
from lora_proxy.retries import Budget
from lora_proxy.routing import POLICIES, Spill
from lora_proxy.server import Server
from lora_proxy.settings import Settings, UpstreamSettings
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
        self._tasks = Tasks()
        # A thread of its own: a hung volume under the upstreams' file is not the adapters'.
        self._discovery_files = Files(1)
        self._shared = Shared(
            self._metrics,
            self._tasks,
            Files(),
            settings.load_timeout,
            Thresholds(**asdict(settings.health)),
            settings.warm_up,
        )
        self.fleet = Fleet(
            Catalog.build(
                settings.adapters, default_model=settings.default_model, routes=settings.routes
            ),
            _plan(settings),
            self._shared,
            self._member,
        )
        self._proxy = self._front()
        self._runner = web.ServerRunner(
            Server(self._proxy, header_limit=settings.limits.headers),
            shutdown_timeout=settings.timeouts.drain,
        )
        self.url = ""

    def _front(self) -> proxy.Proxy:
        settings = self._settings
        retry = settings.retry
        forwarder = Forwarder(
            self.fleet,
            self._metrics,
            Retry(retry.attempts, Budget(retry.budget), retry.replay_started),
            tasks=self._tasks,
            mirror_limit=settings.mirror_limit,
        )
        limits = proxy.Limits(
            body=settings.limits.body,
            headers=settings.limits.headers,
            silence=settings.timeouts.client,
            strict_paths=settings.strict_paths,
            chat_template=settings.allow_chat_template,
            prefixes=settings.routing.policy == "prefix-affinity",
        )
        keys = Keys(key.get_secret_value() for key in settings.api_keys)
        return proxy.Proxy(self.fleet, self._metrics, forwarder, limits, keys)

    async def start(self) -> None:
        """Finds and asks the upstreams once, then listens.

        Raises:
            ConflictError: An adapter has the name of a base model.
            OSError: The address cannot be listened on.
        """
        await self._discover()
        if conflicts := self.fleet.catalog.conflicts():
            raise ConflictError(conflicts)
        await self._runner.setup()
        listen = self._settings.listen
        site = web.TCPSite(self._runner, listen.host, listen.port, backlog=1024)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _discover(self) -> None:
        """Starts with the upstreams there are now, and follows them where they can change."""
        settings = self._settings
        source = discovery.sources_of(settings, self._discovery_files)
        upstreams: Sequence[UpstreamSettings] = ()
        try:
            upstreams = await source.upstreams()
        except discovery.DiscoveryError as error:
            log.warning("no upstream yet: %s", error)
        await self.fleet.start(upstreams)
        if settings.upstreams_file is not None or any(one.dns for one in settings.upstreams):
            interval = settings.discovery_interval
            self._tasks.spawn(discovery.watch(source, interval, self.fleet.apply, known=upstreams))

    async def drain(self) -> None:
        """Says at `/ready` that this proxy is leaving, and goes on serving for the notice."""
        self._proxy.draining = True
        await asyncio.sleep(self._settings.timeouts.notice)

    async def stop(self) -> None:
        """Takes no more requests, lets those under way finish for a while, ends the rest."""
        self._proxy.draining = True
        await self._runner.cleanup()
        await self.fleet.close()
        self._discovery_files.close()
        await self._session.close()

    def _member(self, one: UpstreamSettings) -> Member:
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
            one.tls.server_name,
        )
        control = ControlClient(
            self._session,
            one.url,
            api_key=one.api_key.get_secret_value() if one.api_key else None,
            timeout=PROBE_TIMEOUT,
            load_timeout=self._settings.load_timeout,
            ssl=context if context is not None else True,
            server_name=one.tls.server_name,
        )
        return Member(pool, control, self._shared, one)


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
    # SIGTERM comes from who runs fleets, SIGINT from who sits there and waits.
    stopped, hurried = asyncio.Event(), asyncio.Event()

    def on_signal(number: int) -> None:
        if stopped.is_set() or number == signal.SIGINT:
            hurried.set()
        stopped.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    app = App(settings)
    try:
        await _first(app.start(), stopped)
        if not stopped.is_set():
            log.info("listening on %s", app.url)
            await stopped.wait()
            log.info("stopping; requests under way have %g s", settings.timeouts.drain)
            if not hurried.is_set():
                await _first(app.drain(), hurried)
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


def _plan(settings: Settings) -> Plan:
    routing = settings.routing
    return Plan(
        policy=POLICIES[routing.policy],
        spill=Spill(routing.spill_factor, routing.spill_floor),
        probe_interval=settings.probe_interval,
        watch_interval=settings.watch_interval,
        idle_ttl=settings.idle_ttl,
        queue_length=settings.queue.length,
        queue_timeout=settings.queue.timeout,
        base_aliases=settings.base_aliases,
    )


def _tls(one: UpstreamSettings) -> ssl.SSLContext | None:
    """How an https upstream is verified."""
    if not one.url.startswith("https:"):
        return None
    context = ssl.create_default_context(cafile=one.tls.ca_file)
    if not one.tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
