"""The sole owner of runtime state: the upstreams, the catalog, and who may use what when.

The decisions are made by `catalog`, `routing`, `residency` and `admission`, from values;
this module keeps the state between them and awaits only between decisions. Known state is
what the upstreams report, wanted state is the catalog; they meet when a request needs an
adapter and whenever an upstream is probed.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from lora_proxy import discovery
from lora_proxy.catalog import Catalog
from lora_proxy.errors import ProxyError
from lora_proxy.gate import Gate
from lora_proxy.member import Lease, Member, Shared
from lora_proxy.metrics import NONE
from lora_proxy.routing import Ask, Candidate, Policy, Ranked, Spill, lora_affinity
from lora_proxy.settings import UpstreamSettings
from lora_proxy.types import Adapter, BaseModel, Card, Module, is_served_name
from lora_proxy.versions import Version, Versions

log = logging.getLogger(__name__)

Model = Adapter | BaseModel
"""What one request is answered by; a route has been resolved to one of these."""

SWEEPS = 4  # an idle adapter is looked at so often in its idle_ttl
RETRY_AFTER = 5.0  # seconds; what a client is told where nothing is usable
LEAVING = 30.0  # seconds that a removed upstream's requests have to end


@dataclass(frozen=True, slots=True)
class Plan:
    """How the fleet behaves; the settings that concern it.

    Attributes:
        policy: Orders the candidates.
        spill: When a holder has its hands full.
        probe_interval: Seconds between two probes of an upstream, while all is well.
        watch_interval: Seconds between two looks at adapters' files; 0 is never.
        idle_ttl: Seconds after which an idle adapter is unloaded; None is never.
        queue_length: Requests that may wait for a place.
        queue_timeout: Seconds that one waits.
        base_aliases: A base model's name -> further names for it.
    """

    policy: Policy
    spill: Spill
    probe_interval: float
    watch_interval: float
    idle_ttl: float | None
    queue_length: int
    queue_timeout: float
    base_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """One upstream to try, in the order of `Fleet.route`.

    Attributes:
        member: Where.
        ranked: Why there.
        model: What for; None for a request without a model of ours.
        hope: Its probes fail, and it is tried because nobody else is there.
    """

    member: Member
    ranked: Ranked
    model: Model | None
    hope: bool = False


class Fleet:
    """All upstreams and the catalog.

    Args:
        catalog: The wanted adapters.
        plan: How to behave.
        shared: Ended by `close`.
        make_member: Builds a member from its settings.

    Attributes:
        catalog: The present snapshot; replaced, never changed.
        members: The upstreams by name; replaced, never changed.
    """

    def __init__(
        self,
        catalog: Catalog,
        plan: Plan,
        shared: Shared,
        make_member: Callable[[UpstreamSettings], Member],
    ) -> None:
        self.catalog = catalog
        self.members: Mapping[str, Member] = {}
        self.versions = Versions(shared.files, shared.tasks, shared.load_timeout)
        self._plan = plan
        self._shared = shared
        self._make_member = make_member
        self._gate = Gate(plan.queue_length, plan.queue_timeout, shared.metrics)
        self._turns = count()
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[Member] = set()
        self._exported: set[tuple[str, str]] = set()
        self._swaps: dict[str, asyncio.Task[None]] = {}
        self._stuck: dict[str, str] = {}  # adapter -> the served name that could not take over
        self._ahead: dict[str, asyncio.Task[None]] = {}
        self._unplaced: set[str] = set()
        self._applying = asyncio.Lock()

    # --- life --------------------------------------------------------------------------

    async def start(self, upstreams: Sequence[UpstreamSettings]) -> None:
        """Probes every upstream once, then goes on doing so in the background.

        An upstream that cannot be reached is no error: it may be starting.
        """
        self._install(map(self._make_member, upstreams), {})
        await asyncio.gather(*(self._probe(member) for member in self.members.values()))
        for member in self.members.values():
            self._watch(member)
        if self._plan.watch_interval:
            self._shared.tasks.spawn(self._watch_files())
        if self._plan.idle_ttl is not None:
            self._shared.tasks.spawn(self._sweep(self._plan.idle_ttl / SWEEPS))

    async def close(self) -> None:
        """Ends every task and connection."""
        await self._shared.tasks.close()
        for member in (*self.members.values(), *self._leaving):
            member.pool.close()
        self._shared.files.close()

    async def apply(self, upstreams: Sequence[UpstreamSettings]) -> None:
        """Makes these the upstreams. Who leaves gets no new requests, and ends its old ones.

        Who joins is probed before anybody leaves: one that takes another's place can take
        its requests at once, and its base models never vanish between the two.
        """
        async with self._applying:
            change = discovery.difference(
                [member.settings for member in self.members.values()], upstreams
            )
            for one in change.changed:
                self.members[one.name].adjust(one)
            added = [self._make_member(one) for one in change.added]
            await asyncio.gather(*(member.probe(self._is_ours) for member in added))
            removed = [self.members[one.name] for one in change.removed]
            kept = {n: m for n, m in self.members.items() if m not in removed}
            self._install(added, kept)
            for member in removed:
                self._remove(member)
            for member in added:
                log.info("upstream %s joins", member.name)
                self._watch(member)

    def drain(self, name: str, *, draining: bool) -> None:
        """Whether an upstream is to get no new requests.

        Raises:
            KeyError: There is none of this name.
        """
        self.members[name].draining = draining

    @property
    def ready(self) -> bool:
        """At least one upstream is usable."""
        return any(member.usable for member in self.members.values())

    def _install(self, added: Iterable[Member], kept: Mapping[str, Member]) -> None:
        self.members = {**kept, **{member.name: member for member in added}}
        for member in self.members.values():
            self._gate.limit(member.place, member.settings.max_in_flight)
        self._take_bases()

    def _remove(self, member: Member) -> None:
        log.info("upstream %s leaves", member.name)
        member.draining = True
        self._leaving.add(member)
        self._watchers.pop(member.name).cancel()
        self._gate.remove(member.place)
        self._shared.tasks.spawn(self._leave(member))

    async def _leave(self, member: Member) -> None:
        """Lets its requests end for a while, then closes the way to it."""
        try:
            async with asyncio.timeout(LEAVING):
                while member.in_flight or member.slots.waiting:  # noqa: ASYNC110  # rare, and nobody waits for it
                    await asyncio.sleep(0.1)
        except TimeoutError:
            log.warning("%s: %d requests did not end in time", member.name, member.in_flight)
        finally:
            member.pool.close()
            self._leaving.discard(member)
            self._export_gone(member)

    # --- route -------------------------------------------------------------------------

    async def route(self, model: Model | None, prefix: bytes = b"") -> list[Choice]:
        """The upstreams to try for a model, best first; any will do where there is none.

        1. Those that serve the model, or an adapter's base model.
        2. Of these the usable ones, in the policy's order.
        3. If none is usable: those whose probes alone say so. What we know may be old, and
           a refused connection costs less than a refused request.

        Args:
            model: What is asked for.
            prefix: The beginning of the conversation, for prefix-affinity.

        Raises:
            ProxyError: `no_upstream`, with the time after which to try again;
                `adapter_load_timeout` where the adapter's files cannot be read in time.
        """
        # 1.
        version = await self._version(model) if isinstance(model, Adapter) else None
        able = self._able(model, version)
        # 2. and 3.
        usable = [member for member in able if member.usable]
        hope = not usable
        if hope:
            usable = [member for member in able if member.hopeful]
        if not usable:
            raise nothing_usable(member.wait for member in able)
        served = version.module.served if version is not None else None
        name = model.name if isinstance(model, Adapter) else None
        ranked = self._plan.policy(
            Ask(name, prefix, next(self._turns)),
            [_candidate(member, served) for member in usable],
            self._plan.spill,
        )
        return [Choice(self.members[r.name], r, model, hope) for r in ranked]

    def _able(self, model: Model | None, version: Version | None) -> list[Member]:
        members = list(self.members.values())
        if isinstance(model, BaseModel):
            able = [member for member in members if member.serves(model.name)]
            if not able:
                raise ProxyError("no_upstream", f"no upstream serves '{model.name}' any more")
            return able
        if model is None or version is None:
            return members
        bases = {base.name for member in members for base in member.bases}
        wanted = model.base or (version.base if len(bases) > 1 else None)
        if wanted is None:
            return members
        able = [member for member in members if self._fits(member, wanted)]
        if not able:
            raise ProxyError(
                "no_upstream",
                f"adapter '{model.name}' belongs to the base model '{wanted}', which no upstream "
                "serves; set its base, or base_aliases",
            )
        return able

    def _fits(self, member: Member, wanted: str) -> bool:
        """Whether an adapter's base model, however it is called, is one of the member's.

        One that has not answered yet may serve anything; it is not usable anyway.
        """
        if not member.bases:
            return True
        last = wanted.rstrip("/").rpartition("/")[2]
        return any(
            wanted == base.name or wanted in self._plan.base_aliases.get(base.name, ())
            for base in member.bases
        ) or any(
            wanted == root or last == root.rstrip("/").rpartition("/")[2] for root in member.roots
        )

    # --- admit ---------------------------------------------------------------------------

    async def enter(self, label: str, choices: Sequence[Choice]) -> Choice:
        """Takes a place on the first upstream that has room, or waits for one.

        Args:
            label: Whose turn it is counted as.
            choices: As `route` gave them; not empty.

        Returns:
            Where the place is; to be given back by `leave`.

        Raises:
            ProxyError: As `Gate.enter`.
        """
        place = await self._gate.enter(label, [choice.member.place for choice in choices])
        return next(choice for choice in choices if choice.member.place == place)

    def leave(self, choice: Choice) -> None:
        """Gives a place back."""
        self._gate.leave(choice.member.place)

    # --- lease ---------------------------------------------------------------------------

    async def lease(self, choice: Choice) -> Lease:
        """The right to use the model on the chosen upstream; waits for a load if need be.

        Raises:
            ProxyError: As `Member.lease`; `adapter_load_timeout` as `route`.
        """
        model = choice.model
        if not isinstance(model, Adapter):
            name = NONE if model is None else model.name
            return Lease(choice.member, name, name)
        # Asked again: since the routing, the public name may have come to stand for another
        # version, and the old one's name must not be loaded with the new one's weights.
        version = self.versions.present(model.name) or await self._version(model)
        return await choice.member.lease(version.module)

    # --- versions --------------------------------------------------------------------------

    async def _version(self, adapter: Adapter) -> Version:
        """What the adapter's public name stands for.

        Where it is resident, that only changes by a swap. Elsewhere the files are looked at
        now and then, since that is when it would be loaded, or was refused.
        """
        present = self.versions.present(adapter.name)
        if present is not None and self._holders(present.module):
            return present
        version = await self.versions.look(adapter)
        present = self.versions.present(adapter.name)
        if present is None or not self._holders(present.module):
            self._take(version, present)
            return version
        return present

    def _holders(self, module: Module) -> list[Member]:
        return [m for m in self.members.values() if m.slots.resident(module.served)]

    def _take(self, version: Version, before: Version | None) -> None:
        """Repoints a public name, and lets the old version go once nobody uses it."""
        self.versions.take(version)
        if before is None or before.module.served == version.module.served:
            return
        log.info("adapter '%s' is now %s", version.module.adapter, version.module.served)
        for member in self.members.values():
            member.retire(before.module.served)

    async def _watch_files(self) -> None:
        while True:
            await asyncio.sleep(self._plan.watch_interval * _jitter())
            for adapter in self.catalog.adapters:
                present = self.versions.present(adapter.name)
                if present is not None and self._holders(present.module):
                    await self.refresh(adapter)

    async def refresh(self, adapter: Adapter) -> None:
        """Looks whether an adapter in use has changed, and swaps it if so.

        The new version is loaded beside the old one wherever that is; then the public name
        is repointed, in one assignment; then the old one drains. If it can be loaded
        nowhere, the old one stays.

        However many ask, there is one swap of an adapter at a time: of two, the one that saw
        older files could end last.
        """
        task = self._swaps.get(adapter.name)
        if task is None:
            task = self._swaps[adapter.name] = self._shared.tasks.spawn(self._swap(adapter))
            task.add_done_callback(lambda _: self._swaps.pop(adapter.name))
        await asyncio.shield(task)  # who asked may leave; others wait for it too

    async def _swap(self, adapter: Adapter) -> None:
        present = self.versions.present(adapter.name)
        try:
            version = await self.versions.look(adapter, fresh=True)
        except ProxyError as error:
            log.warning("%s", error.message)
            return
        if present is None or version.module.served == present.module.served:
            self.versions.take(version)
            return
        holders = self._holders(present.module)
        if adapter.pin:
            for member in holders:
                member.pin(version.module.served, pinned=True)
        loads = (member.ensure(version.module, beside=True) for member in holders)
        results = await asyncio.gather(*loads, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures and len(failures) == len(holders):
            self._stays(version.module, failures[0])
            return
        self._take(version, present)
        self._load_ahead(adapter)

    def _stays(self, module: Module, why: BaseException) -> None:
        """Says, once for each content, that it does not take over."""
        if isinstance(why, ProxyError) and why.code == "adapter_changed":
            log.info("adapter '%s' is being written; it is looked at again", module.adapter)
        elif self._stuck.get(module.adapter) != module.served:
            self._stuck[module.adapter] = module.served
            log.error("adapter '%s' stays at its old version: %s", module.adapter, why)

    # --- pins --------------------------------------------------------------------------------

    def _load_ahead(self, adapter: Adapter) -> None:
        """Loads it, in the background, wherever it is wanted ahead and is not."""
        wanted = adapter.pin or adapter.replicas is not None
        if wanted and adapter.name not in self._ahead:
            task = self._ahead[adapter.name] = self._shared.tasks.spawn(self._preload(adapter))
            task.add_done_callback(lambda _: self._ahead.pop(adapter.name))

    async def _preload(self, adapter: Adapter) -> None:
        try:
            version = await self._version(adapter)
            able = [member for member in self._able(adapter, version) if member.usable]
        except ProxyError as error:
            if adapter.name not in self._unplaced:  # asked again after every probe
                self._unplaced.add(adapter.name)
                log.warning("adapter '%s' is not loaded ahead: %s", adapter.name, error.message)
            return
        self._unplaced.discard(adapter.name)
        wanted = self._placed(adapter, able)
        for member in able:
            member.pin(version.module.served, pinned=member in wanted and adapter.pin)
        lacking = [member for member in wanted if member.lacks(version.module.served)]
        loads = (member.ensure(version.module) for member in lacking)
        results = await asyncio.gather(*loads, return_exceptions=True)
        for member, result in zip(lacking, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("%s: '%s' is not loaded ahead: %s", member.name, adapter.name, result)

    def _placed(self, adapter: Adapter, able: Sequence[Member]) -> list[Member]:
        """Where an adapter is wanted ahead: everywhere, or where the hash places it."""
        if adapter.replicas is None:
            return list(able)
        idle = [
            Candidate(m.name, True, False, False, False, True, False, 0, m.settings.weight)
            for m in able
        ]
        ranked = lora_affinity(Ask(adapter.name), idle, self._plan.spill)
        return [self.members[r.name] for r in ranked[: adapter.replicas]]

    # --- background --------------------------------------------------------------------------

    def _watch(self, member: Member) -> None:
        self._watchers[member.name] = self._shared.tasks.spawn(self._probe_for_ever(member))

    async def _probe_for_ever(self, member: Member) -> None:
        """Goes on from a first probe."""
        while True:
            if member.usable:  # it has come, or come back, or forgotten what it had
                for adapter in self.catalog.adapters:
                    self._load_ahead(adapter)
            interval = self._plan.probe_interval
            await asyncio.sleep(member.health.next_probe(interval, _jitter()))
            await self._probe(member)

    async def _probe(self, member: Member) -> None:
        before = member.bases
        await member.probe(self._is_ours)
        if member.bases != before:
            self._take_bases()

    async def _sweep(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            for member in self.members.values():
                member.sweep(SWEEPS)

    def _is_ours(self, card: Card) -> bool:
        """A served name that a proxy gave to an adapter of the catalog, from its path."""
        if card.parent is None or not is_served_name(card.id):
            return False
        adapter = self.catalog.adapter(card.id.rpartition("@")[0])
        return adapter is not None and adapter.path == card.root

    def _take_bases(self) -> None:
        known = set(self.catalog.conflicts())
        self.catalog = self.catalog.with_bases(
            base for member in self.members.values() for base in member.bases
        )
        for conflict in self.catalog.conflicts():
            if conflict not in known:
                log.error("%s", conflict)

    # --- metrics -----------------------------------------------------------------------------

    def export(self) -> None:
        """Writes the gauges; called when they are asked for, not as the state changes."""
        metrics = self._shared.metrics
        resident = set()
        for member in (*self._leaving, *self.members.values()):
            metrics.upstream_up(member.name).set(member.usable)
            for label, active in member.active.items():
                metrics.in_flight(label, member.name).set(active)
            for served in member.slots.residents:
                name = served.rpartition("@")[0]
                if self.catalog.adapter(name) is not None:
                    resident.add((name, member.name))
        for pair in self._exported | resident:
            metrics.resident(*pair).set(pair in resident)
        self._exported |= resident
        metrics.queue_depth.set(self._gate.depth)

    def _export_gone(self, member: Member) -> None:
        """An upstream that has left is not up; one of its name says so itself."""
        self._shared.metrics.upstream_up(member.name).set(0)
        for label in member.active:
            self._shared.metrics.in_flight(label, member.name).set(0)


def nothing_usable(waits: Iterable[float | None] = ()) -> ProxyError:
    """The error where every upstream is down, or has asked to be left alone.

    Args:
        waits: Seconds until each may be usable again; None where only a probe can tell.
    """
    return ProxyError(
        "no_upstream",
        "no upstream is usable at the moment; try again, or see /ready and the log",
        retry_after=min((wait for wait in waits if wait is not None), default=RETRY_AFTER),
    )


def _candidate(member: Member, served: str | None) -> Candidate:
    """What routing needs to know of one upstream."""
    slots = member.slots
    available = slots.available
    return Candidate(
        name=member.name,
        usable=True,
        resident=served is not None and slots.resident(served),
        busy=served is not None and slots.leases(served) > 0,
        loading=served is not None and slots.coming(served),
        free=available and slots.free != 0,
        evictable=available,
        load=member.in_flight + slots.waiting,
        weight=member.weight,
    )


def _jitter() -> float:
    """So that many proxies do not act in step."""
    return random.uniform(0.9, 1.1)  # noqa: S311
