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

from lora_proxy import sources, vllm
from lora_proxy.background import Files, Tasks
from lora_proxy.errors import ProxyError
from lora_proxy.metrics import Metrics
from lora_proxy.residency import Command, Grant, Load, Refuse, Slots, Ticket, Unload
from lora_proxy.routing import Health
from lora_proxy.types import BaseModel, Card, Module
from lora_proxy.upstream import Pool

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 5.0  # seconds for health and models together
BACKOFF_FIRST, BACKOFF_MOST = 0.5, 30.0  # seconds, doubled from try to try, then jittered
RETRY_UNSEEN = 60.0  # seconds until a refused adapter whose files we cannot watch is tried again


class Lease:
    """One request's right to use a resident adapter, or a base model, on one upstream.

    Attributes:
        member: Where to send the request.
        model: What to write into the request's `model`.
        label: The public adapter's or the base model's name, or `metrics.NONE`.
    """

    __slots__ = ("_grant", "_served", "label", "member", "model")

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
        member.in_flight += 1
        member.active[label] = member.active.get(label, 0) + 1

    def release(self) -> None:
        """Ends the lease. To be called exactly once."""
        member = self.member
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
    """

    metrics: Metrics
    tasks: Tasks
    files: Files
    load_timeout: float


class Member:
    """One vLLM server, at run time.

    Args:
        pool: The way to it; gives the name.
        control: Its control API.
        shared: What it has in common with the others.
        capacity: Adapters that may be resident at once; None is no bound.
        max_rank: The server's --max-lora-rank, if known.
        bases: The base models that it is said to serve, until it has been asked.

    Attributes:
        in_flight: Leases now.
        active: The same by label; a label stays, with 0, once it was used.
        bases: The base models that it serves, as last reported.
    """

    def __init__(  # noqa: PLR0913  # keywords, each a fact about the server
        self,
        pool: Pool,
        control: vllm.ControlClient,
        shared: Shared,
        *,
        capacity: int | None = None,
        max_rank: int | None = None,
        bases: tuple[BaseModel, ...] = (),
    ) -> None:
        self.name = pool.name
        self.pool = pool
        self.slots = Slots(capacity)
        self.health = Health(up=False)  # until the first probe says otherwise
        self.bases = bases
        self.in_flight = 0
        self.active: dict[str, int] = {}
        self._control = control
        self._shared = shared
        self._max_rank = max_rank
        self._waiting: dict[Ticket, tuple[asyncio.Future[Grant], Module]] = {}
        self._failures: dict[str, int] = {}  # served name -> failures in a row that may pass
        # The operator's names (--lora-modules), and the content that they were adopted for:
        # after the files changed, such a name still has the old weights.
        self._adopted: dict[str, str] = {}
        self._tickets = itertools.count(1)

    # --- leases ----------------------------------------------------------------------

    async def lease(self, module: Module) -> Lease:
        """Waits until the adapter is resident, loading it if need be.

        Raises:
            ProxyError: Why it cannot be had here; `replayable` if elsewhere it might be.
        """
        ticket = next(self._tickets)
        commands = self.slots.acquire(ticket, module.served, self._now())
        first = commands[0] if commands else None
        if isinstance(first, Grant):  # the usual case: it is resident
            grant = first
        else:
            grant = await self._wait(ticket, module, commands)
        return Lease(self, module.adapter, grant.module, module.served, grant)

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

    def retire(self, served: str) -> None:
        """Unloads, after its last lease, a served name that gets no new ones."""
        self._failures.pop(served, None)
        self._run(self.slots.retire(served))

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
        was_up = self.health.up
        self.health = self.health.ok(self._now())
        if self.health.up and not was_up:
            log.info("%s is up", self.name)
        self.bases = tuple(
            BaseModel(card.id, card.max_model_len) for card in cards if card.parent is None
        )
        names = {card.id for card in cards if card.parent is not None}
        listed = {served: name for served, name in self.slots.residents.items() if name in names}
        listed.update((card.id, card.id) for card in cards if is_ours(card))
        self._run(self.slots.reported(listed, marker))

    def failed(self, error: ProxyError) -> None:
        """A probe, or a request's connection, failed."""
        was_up = self.health.up
        self.health = self.health.failed(self._now())
        self._adopted.clear()  # it may have restarted, and read the files anew
        if was_up and not self.health.up:
            log.warning("%s is down: %s", self.name, error.message)

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
        started = self._now()
        try:
            async with asyncio.timeout(self._shared.load_timeout):
                name, result = await self._ensure(module)
        except TimeoutError:
            self._load_failed(module, self._took_too_long(module))
        except ProxyError as error:
            self._load_failed(module, error)
        except BaseException as error:
            self._load_failed(module, self._broken_off(module, error))
            raise
        else:
            taken = self._now() - started
            log.info("%s: %s is resident (%s, %.3f s)", self.name, module.served, result, taken)
            self._shared.metrics.loads(module.adapter, self.name, result).inc()
            self._shared.metrics.load_duration(module.adapter).observe(taken)
            self._failures.pop(module.served, None)
            self._run(self.slots.loaded(module.served, name))

    async def _ensure(self, module: Module) -> tuple[str, str]:
        """Adopts the adapter if it is there, else inspects its files and loads them.

        Returns:
            The name under which it is served, and the result for the metric.
        """
        name = vllm.adopted(await self._control.models(), module)
        if name is not None and (
            name == module.served or self._adopted.setdefault(name, module.served) == module.served
        ):
            return name, "adopted"
        try:
            await self._shared.files.call(sources.inspect, module.path, self._max_rank)
        except ProxyError as error:
            raise ProxyError(error.code, f"adapter '{module.adapter}': {error.message}") from None
        return await self._control.load(module), "ok"

    def _load_failed(self, module: Module, error: ProxyError) -> None:
        if not vllm.permanent(error):
            error.replayable = True  # whatever broke, no generation has begun
        log.warning("%s: %s not loaded: %s", self.name, module.served, error.message)
        self._shared.metrics.loads(module.adapter, self.name, error.code).inc()
        retry_at = self._retry_at(module, error)
        self._run(self.slots.load_failed(module.served, error, retry_at))

    def _retry_at(self, module: Module, error: ProxyError) -> float | None:
        """When to ask again; None: not before the adapter's content changes.

        1. The server was not there: at once, it may be back.
        2. A bad adapter: when its files change, which makes another served name. Where
           they cannot be seen, after a while.
        3. Whatever may pass: after a backoff with jitter.
        """
        now = self._now()
        # 1.
        if error.code == "upstream_connect":
            return now
        # 2.
        if vllm.permanent(error):
            return None if module.watched else now + RETRY_UNSEEN
        # 3.
        failures = self._failures[module.served] = self._failures.get(module.served, 0) + 1
        backoff = min(BACKOFF_MOST, BACKOFF_FIRST * 2.0 ** min(failures - 1, 16))
        return now + backoff * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, not a secret

    async def _unload(self, name: str, reason: str) -> None:
        result = reason
        try:
            await self._control.unload(name)
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
    def _now() -> float:
        return asyncio.get_running_loop().time()
