"""One upstream as a member of the fleet: its adapters, leases, loads and health.

Carries out what `residency` decides: the decisions are synchronous, and only the loads
and unloads that they ask for are awaited. Knows nothing of other upstreams, of public
names, or of the client's request.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_proxy import vllm
from lora_proxy.background import Files, Tasks
from lora_proxy.errors import ProxyError
from lora_proxy.health import Circuit, Health, Thresholds
from lora_proxy.loader import Loader
from lora_proxy.metrics import Metrics
from lora_proxy.residency import Command, Grant, Load, Refuse, Slots, Ticket, Unload
from lora_proxy.settings import UpstreamSettings
from lora_proxy.types import BaseModel, Card, Module
from lora_proxy.upstream import Pool

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 5.0  # seconds for health and models together
BACKOFF_FIRST, BACKOFF_MOST = 0.5, 30.0  # seconds, doubled from try to try, then jittered
RETRY_UNSEEN = 60.0  # seconds until a refused adapter whose files we cannot watch is tried again


_serial = itertools.count(1)


class Lease:
    """One request's right to use a resident adapter, or a base model, on one upstream.

    What the request learns of the upstream's health is told here: `answered` or `faulted`,
    at most one of them before `release`.

    Attributes:
        member: Where to send the request.
        model: What to write into the request's `model`.
        label: The public adapter's or the base model's name.
    """

    __slots__ = ("_grant", "_pending", "_served", "_trial", "label", "member", "model")

    def __init__(
        self,
        member: "Member",
        label: str,
        model: str,
        served: str = "",
        grant: Grant | None = None,
    ) -> None:
        self.member = member
        self.label = label
        self.model = model
        self._served = served
        self._grant = grant
        self._trial = member.health.begin()
        self._pending = True
        member.in_flight += 1
        member.active[label] = member.active.get(label, 0) + 1

    def answered(self) -> None:
        """The upstream has begun a sound answer."""
        self._pending = False
        self.member.health.succeeded(self.member.now(), trial=self._trial)

    def faulted(self, error: ProxyError) -> None:
        """The request failed by the upstream's fault; also after it was `answered`."""
        trial = self._trial and self._pending
        self._pending = False
        self.member.request_failed(error, trial=trial)

    def release(self) -> None:
        """Ends the lease. To be called exactly once."""
        member = self.member
        if self._pending:
            member.health.cancelled(trial=self._trial)
        member.in_flight -= 1
        member.active[self.label] -= 1
        if self._grant is not None:
            member.release(self._grant.ticket)

    def lost(self) -> bool:
        """The upstream answered that it does not know the model.

        Returns:
            True if that was an adapter. It is taken for not resident from now on, so that
            the next lease loads it again. False for a base model.
        """
        if self._grant is None:
            return False
        self.member.lost(self._served, self._grant.generation)
        return True


@dataclass(frozen=True, slots=True)
class Shared:
    """What all members use together.

    Attributes:
        metrics: Where loads are counted.
        tasks: Owns the loads and unloads.
        files: Reads adapters' files.
        load_timeout: Seconds that a request waits for its adapter, and that a load may take.
        thresholds: When an upstream counts as down.
        warm_up: After a load, one request of one token before the adapter gets traffic.
    """

    metrics: Metrics
    tasks: Tasks
    files: Files
    load_timeout: float
    thresholds: Thresholds
    warm_up: bool


class Member:
    """One vLLM server, at run time.

    Args:
        pool: The way to it; gives the name.
        control: Its control API.
        shared: What it has in common with the others.
        settings: What the operator says of it.

    Attributes:
        settings: As given; replaced by `adjust`.
        draining: Gets no new requests.
        place: Tells it from another member of its name, before or after it.
        in_flight: Leases now.
        active: The same by label; a label stays, with 0, once it was used.
        bases: The base models that it serves, as last reported, or as declared until then.
        roots: Where it has them from: folders or repositories.
        authorization: The field that it wants of every request, if any.
    """

    def __init__(
        self, pool: Pool, control: vllm.ControlClient, shared: Shared, settings: UpstreamSettings
    ) -> None:
        self.name = pool.name
        self.pool = pool
        self.settings = settings
        self.draining = settings.drain
        self.slots = Slots(_capacity(settings))
        self.health = Health(shared.thresholds, up=False)  # until the first probe says otherwise
        self.bases: tuple[BaseModel, ...] = ()
        if settings.base_model:
            self.bases = (BaseModel(settings.base_model),)
        self.roots: frozenset[str] = frozenset()
        self.place = f"{pool.name}#{next(_serial)}"
        self.in_flight = 0
        self.active: dict[str, int] = {}
        self._loader = Loader(pool, control, shared.files, settings, warm_up=shared.warm_up)
        self.authorization = self._loader.authorization
        self._control = control
        self._shared = shared
        self._waiting: dict[Ticket, tuple[asyncio.Future[Grant], Module]] = {}
        self._failures: dict[str, int] = {}  # served name -> failures in a row that may pass
        self._tickets = itertools.count(1)

    def adjust(self, settings: UpstreamSettings) -> None:
        """Takes over what can change while it runs: weight, limits, drain."""
        before, self.settings = self.settings, settings
        self._loader.settings = settings
        if settings.drain != before.drain:  # else an operator's word at run time stands
            self.draining = settings.drain
        if _capacity(settings) != _capacity(before):  # else what the server told stands
            self._run(self.slots.resize(_capacity(settings)))

    @property
    def usable(self) -> bool:
        """Whether it may get a request now."""
        return not self.draining and self.health.usable(self.now())

    @property
    def hopeful(self) -> bool:
        """Whether it is worth a try although its probes fail: it may just have come back."""
        health = self.health
        return not (self.draining or health.up or health.circuit is Circuit.OPEN)

    @property
    def wait(self) -> float | None:
        """Seconds until it may be usable again; None where only a probe can tell."""
        return None if self.draining else self.health.wait(self.now())

    @property
    def weight(self) -> float:
        """Its capacity relative to the others', less while it starts slowly."""
        return self.settings.weight * self.health.share(self.now())

    # --- leases ----------------------------------------------------------------------

    async def lease(self, module: Module) -> Lease:
        """Waits until the adapter is resident, loading it if need be.

        Raises:
            ProxyError: Why it cannot be had here; `replayable` if elsewhere it might be.
        """
        grant = await self._granted(module)
        return Lease(self, module.adapter, grant.module, module.served, grant)

    async def ensure(self, module: Module, *, beside: bool = False) -> None:
        """Makes the adapter resident without a request for it.

        Args:
            module: What to load.
            beside: Its predecessor is resident here, and will be retired.

        Raises:
            ProxyError: As `lease`.
        """
        self.release((await self._granted(module, beside=beside)).ticket)

    async def _granted(self, module: Module, *, beside: bool = False) -> Grant:
        ticket = next(self._tickets)
        commands = self.slots.acquire(ticket, module.served, self.now(), beside=beside)
        first = commands[0] if commands else None
        if isinstance(first, Grant):  # the usual case: it is resident
            return first
        return await self._wait(ticket, module, commands)

    async def _wait(self, ticket: int, module: Module, commands: Sequence[Command]) -> Grant:
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = (future, module)
        self._run(commands)
        try:
            async with asyncio.timeout(self._shared.load_timeout):
                return await future
        except BaseException as error:
            # Too late or cancelled, perhaps just as the answer came: nobody else looks at it.
            if future.done() and not future.cancelled():
                future.exception()
            self.release(ticket)
            if isinstance(error, TimeoutError):
                raise self._took_too_long(module) from None
            raise
        finally:
            del self._waiting[ticket]

    def release(self, ticket: Ticket) -> None:
        """Ends a lease, or withdraws a waiter."""
        self._run(self.slots.release(ticket))

    def lost(self, served: str, generation: int) -> None:
        """The upstream does not know an adapter that it was believed to hold."""
        log.warning("%s has forgotten %s; it will be loaded again", self.name, served)
        self._run(self.slots.lost(served, generation))

    def hold(self, seconds: float) -> None:
        """The upstream asked to be left alone for so long."""
        log.info("%s asks to be left alone for %g s", self.name, seconds)
        self.health.unavailable_until(self.now(), seconds)

    def retire(self, served: str) -> None:
        """Unloads, after its last lease, a served name that gets no new ones."""
        self._failures.pop(served, None)
        self._run(self.slots.retire(served))

    def lacks(self, served: str) -> bool:
        """Whether it is not resident here, and a load might bring it."""
        return not self.slots.resident(served) and not self.slots.failure(served, self.now())

    def pin(self, served: str, *, pinned: bool) -> None:
        """Whether this served name is never to be evicted here."""
        if pinned:
            self.slots.pin(served)
        else:
            self._run(self.slots.unpin(served))

    def sweep(self, age: int) -> None:
        """Unloads what nobody has used for so many sweeps."""
        self._run(self.slots.sweep(age))

    def serves(self, base: str) -> bool:
        """Whether this is the name of a base model here."""
        return any(known.name == base for known in self.bases)

    # --- the upstream's own word -----------------------------------------------------

    async def probe(self, is_ours: Callable[[Card], bool]) -> None:
        """Asks for health and models, and takes over what it says.

        Args:
            is_ours: Whether a card is a served name that the catalog would give.
        """
        marker = self.slots.marker()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._control.healthy()
                cards = await self._control.models()
        except TimeoutError:
            why = f"{self.name} did not answer a probe within {PROBE_TIMEOUT:g} s"
            self.failed(ProxyError("upstream_timeout", why))
            return
        except ProxyError as error:
            self.failed(error)
            return
        if self.health.probe_ok(self.now()):
            log.info("%s is up", self.name)
        self.bases = tuple(
            BaseModel(card.id, card.max_model_len) for card in cards if card.parent is None
        )
        self.roots = frozenset(card.root for card in cards if card.parent is None and card.root)
        names = {card.id for card in cards if card.parent is not None}
        listed = {served: name for served, name in self.slots.residents.items() if name in names}
        listed.update((card.id, card.id) for card in cards if is_ours(card))
        self._run(self.slots.reported(listed, marker))
        if self.slots.capacity is None:
            await self._learn_capacity()

    async def _learn_capacity(self) -> None:
        """Takes vLLM's own word where the operator says nothing; it tells once LoRA was used."""
        try:
            loras = await self._control.max_loras()
        except ProxyError as error:  # a server without metrics is none the worse
            log.debug("%s: max_loras is not known: %s", self.name, error.message)
            return
        if loras:
            log.info("%s computes %d adapters at once, and keeps as many", self.name, loras)
            self._run(self.slots.resize(loras))

    def failed(self, error: ProxyError) -> None:
        """A probe failed, or a connection, which says as much."""
        self._loader.restarted()  # perhaps
        if self.health.probe_failed():
            log.warning("%s is down: %s", self.name, error.message)

    def request_failed(self, error: ProxyError, *, trial: bool) -> None:
        """A request failed by this upstream's fault."""
        if error.code == "upstream_connect":
            self.failed(error)
            if not trial:
                # Whether anybody listens is the probes' to say. An open circuit would keep
                # requests from a server that has just been started again.
                return
        jitter = random.uniform(0.8, 1.2)  # noqa: S311  # so that proxies do not try in step
        if self.health.failed(self.now(), jitter, trial=trial):
            log.warning("%s is left alone for a while: %s", self.name, error.message)

    # --- commands --------------------------------------------------------------------

    def _run(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Grant(ticket=ticket):
                    self._settle(ticket, command)
                case Refuse(ticket=ticket, error=error):
                    self._settle(ticket, error)
                case Load(served=served):
                    self._shared.tasks.spawn(self._load(self._module(served)))
                case Unload(module=name, reason=reason):
                    self._shared.tasks.spawn(self._unload(name, reason))

    def _module(self, served: str) -> Module:
        """What somebody waits for: a load is only asked for while somebody does."""
        return next(m for _, m in self._waiting.values() if m.served == served)

    def _settle(self, ticket: Ticket, outcome: Grant | ProxyError) -> None:
        future, _ = self._waiting[ticket]
        if future.done():
            return  # cancelled in this very turn of the loop: it will release its ticket
        if isinstance(outcome, ProxyError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    async def _load(self, module: Module) -> None:
        """One load, from the look whether it is needed to the answer for all who wait."""
        started = self.now()
        try:
            async with asyncio.timeout(self._shared.load_timeout):
                name, result = await self._loader.load(module)
        except TimeoutError:
            self._load_failed(module, self._took_too_long(module))
        except ProxyError as error:
            self._load_failed(module, error)
        except BaseException as error:
            self._load_failed(module, self._broken_off(module, error))
            raise
        else:
            taken = self.now() - started
            log.info("%s: %s is resident (%s, %.3f s)", self.name, module.served, result, taken)
            self._shared.metrics.loads(module.adapter, self.name, result).inc()
            self._shared.metrics.load_duration(module.adapter).observe(taken)
            self._failures.pop(module.served, None)
            self._run(self.slots.loaded(module.served, name))

    def _load_failed(self, module: Module, error: ProxyError) -> None:
        if not vllm.permanent(error):
            error.replayable = True  # whatever broke, no generation has begun
        log.warning("%s: %s not loaded: %s", self.name, module.served, error.message)
        self._shared.metrics.loads(module.adapter, self.name, error.code).inc()
        retry_at = self._retry_at(module, error)
        self._run(self.slots.load_failed(module.served, error, retry_at))

    def _retry_at(self, module: Module, error: ProxyError) -> float | None:
        """When to ask again; None: not before the adapter's content changes.

        1. The server was not there, or the files changed meanwhile: at once.
        2. A bad adapter: when its files change, which makes another served name. Where
           they cannot be seen, after a while.
        3. Whatever may pass: after a backoff with jitter.
        """
        now = self.now()
        # 1.
        if error.code in {"upstream_connect", "adapter_changed"}:
            return now
        # 2.
        if vllm.permanent(error):
            return None if module.fingerprint is not None else now + RETRY_UNSEEN
        # 3.
        failures = self._failures[module.served] = self._failures.get(module.served, 0) + 1
        backoff = min(BACKOFF_MOST, BACKOFF_FIRST * 2.0 ** min(failures - 1, 16))
        return now + backoff * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, not a secret

    async def _unload(self, name: str, reason: str) -> None:
        result = reason
        try:
            await self._loader.unload(name)
        except ProxyError as error:
            # vLLM's list is not bounded: a name that stayed costs it an entry, no more.
            log.warning("%s: %s not unloaded: %s", self.name, name, error.message)
            result = "failed"
        finally:
            self._run(self.slots.unloaded(name))
        self._shared.metrics.unloads(name.rpartition("@")[0] or name, self.name, result).inc()

    def _took_too_long(self, module: Module) -> ProxyError:
        return ProxyError(
            "adapter_load_timeout",
            f"adapter '{module.adapter}' was not loaded on {self.name} within "
            f"{self._shared.load_timeout:g} s; try again, or raise load_timeout",
        )

    def _broken_off(self, module: Module, why: BaseException) -> ProxyError:
        return ProxyError(
            "adapter_load_failed",
            f"the load of adapter '{module.adapter}' on {self.name} was broken off "
            f"({type(why).__name__}); see the proxy's log",
        )

    @staticmethod
    def now() -> float:
        """The loop's clock, in seconds."""
        return asyncio.get_running_loop().time()


def _capacity(settings: UpstreamSettings) -> int | None:
    """Adapters that may be resident at once; vLLM's own default is its --max-loras."""
    return settings.max_cpu_loras or settings.max_loras
