"""The sole owner of runtime state: the upstreams, the catalog, and what adapters are now.

The decisions are made by `catalog`, `routing` and `residency`, from values; this module
keeps the state between them. Known state is what the upstreams report, wanted state is
the catalog; they meet when a request needs an adapter and whenever an upstream is probed.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_proxy import routing, sources
from lora_proxy.catalog import Catalog, Target
from lora_proxy.errors import ProxyError
from lora_proxy.member import Lease, Member, Shared
from lora_proxy.metrics import NONE
from lora_proxy.routing import Candidate, Tier
from lora_proxy.types import Adapter, BaseModel, Card, Module, is_served_name, served_name

log = logging.getLogger(__name__)

RECHECK = 1.0  # seconds between two looks at the files of an adapter that is not resident


@dataclass(frozen=True, slots=True)
class Choice:
    """One upstream to try, in the order of `Fleet.route`.

    Attributes:
        member: Where.
        tier: Why there.
        target: What for; None for a request that names no model.
        module: What must be resident there; None for a base model.
    """

    member: Member
    tier: Tier
    target: Target | None
    module: Module | None

    async def lease(self) -> Lease:
        """The right to use the target here; waits for a load if need be.

        Raises:
            ProxyError: As `Member.lease`.
        """
        if self.target is None:
            return Lease(self.member, NONE, "")
        if self.module is None:
            return Lease(self.member, self.target.name, self.target.name)
        return await self.member.lease(self.module)


@dataclass(frozen=True, slots=True)
class _Known:
    """A module, the state of the files that it stands for, and when that was looked at."""

    module: Module
    fingerprint: object
    checked: float


class Fleet:
    """All upstreams and the catalog.

    Args:
        catalog: The wanted adapters.
        members: Made with the same `shared`.
        shared: Ended by `close`.
        probe_interval: Seconds between two probes of one upstream, jittered by a tenth.

    Attributes:
        catalog: The present snapshot; replaced, never changed.
    """

    def __init__(
        self,
        catalog: Catalog,
        members: Sequence[Member],
        shared: Shared,
        *,
        probe_interval: float,
    ) -> None:
        self.members = tuple(members)
        self.catalog = self._with_bases(catalog)
        self._by_name = {member.name: member for member in members}
        self._adapters = {adapter.name: adapter for adapter in catalog.adapters}
        self._shared = shared
        self._probe_interval = probe_interval
        self._known: dict[str, _Known] = {}
        self._looking: dict[str, asyncio.Task[Module]] = {}
        self._exported: set[tuple[str, str]] = set()

    async def start(self) -> None:
        """Probes every upstream once, then goes on doing so in the background.

        An upstream that cannot be reached is no error: it may be starting.
        """
        await asyncio.gather(*(self._probe(member) for member in self.members))
        for member in self.members:
            self._shared.tasks.spawn(self._watch(member))

    async def close(self) -> None:
        """Ends every task and connection."""
        await self._shared.tasks.close()
        for member in self.members:
            member.pool.close()
        self._shared.files.close()

    @property
    def ready(self) -> bool:
        """At least one upstream is usable."""
        return any(member.health.up for member in self.members)

    async def route(self, target: Target | None) -> list[Choice]:
        """The upstreams to try for a target, best first; all of them where there is none.

        Raises:
            ProxyError: `no_upstream` where none serves the base model;
                `adapter_load_timeout` where the adapter's files cannot be read in time.
        """
        if target is None:
            module, able = None, list(self.members)
        elif isinstance(target, BaseModel):
            module, able = None, [m for m in self.members if m.serves(target.name)]
            if not able:
                raise ProxyError("no_upstream", f"no upstream serves '{target.name}' any more")
        else:
            module, able = await self._module(target), list(self.members)
        served = module.served if module is not None else None
        name = module.adapter if module is not None else None
        ranked = routing.rank(name, [_candidate(member, served) for member in able])
        return [Choice(self._by_name[r.name], r.tier, target, module) for r in ranked]

    async def renewed(self, choice: Choice) -> Choice:
        """The same upstream, for what the adapter's files hold now.

        Raises:
            ProxyError: As `route`.
        """
        if not isinstance(choice.target, Adapter):
            return choice
        return replace(choice, module=await self._module(choice.target))

    # --- what an adapter is now ------------------------------------------------------

    async def _module(self, adapter: Adapter) -> Module:
        """The adapter's present content.

        The files are read when it is first needed, and looked at again, at most once in
        `RECHECK`, while it is nowhere resident: that is when it would be loaded, or was
        refused.
        """
        known = self._known.get(adapter.name)
        if known is not None:
            served = known.module.served
            fresh = asyncio.get_running_loop().time() - known.checked < RECHECK
            if fresh or any(member.slots.resident(served) for member in self.members):
                return known.module
        task = self._looking.get(adapter.name)
        if task is None:
            task = self._looking[adapter.name] = self._shared.tasks.spawn(self._look(adapter))
            task.add_done_callback(lambda _: self._looking.pop(adapter.name))
        try:
            async with asyncio.timeout(self._shared.load_timeout):
                return await asyncio.shield(task)  # others wait for it too
        except TimeoutError:
            raise ProxyError(
                "adapter_load_timeout",
                f"the files of adapter '{adapter.name}' were not read within "
                f"{self._shared.load_timeout:g} s; check the volume that they are on",
                replayable=False,
            ) from None

    async def _look(self, adapter: Adapter) -> Module:
        """Reads what identifies the files now; a change retires the old served name."""
        files, known = self._shared.files, self._known.get(adapter.name)
        fingerprint = await files.call(sources.fingerprint, adapter.path)
        now = asyncio.get_running_loop().time()
        if known is not None and known.fingerprint == fingerprint:
            self._known[adapter.name] = _Known(known.module, fingerprint, now)
            return known.module
        revision = await files.call(sources.revision, adapter.path, adapter.revision)
        module = Module(
            adapter.name,
            served_name(adapter.name, revision),
            adapter.path,
            watched=fingerprint is not None,
        )
        self._known[adapter.name] = _Known(module, fingerprint, now)
        if known is not None and known.module.served != module.served:
            log.info("adapter '%s' has changed: %s", adapter.name, module.served)
            for member in self.members:
                member.retire(known.module.served)
        return module

    # --- probes ----------------------------------------------------------------------

    async def _watch(self, member: Member) -> None:
        while True:
            # Jitter, so that many proxies do not probe in step.
            await asyncio.sleep(self._probe_interval * random.uniform(0.9, 1.1))  # noqa: S311
            await self._probe(member)

    async def _probe(self, member: Member) -> None:
        before = member.bases
        await member.probe(self._is_ours)
        if member.bases != before:
            self._take_bases()

    def _is_ours(self, card: Card) -> bool:
        """A served name that a proxy gave to an adapter of the catalog, from its path."""
        if card.parent is None or not is_served_name(card.id):
            return False
        adapter = self._adapters.get(card.id.rpartition("@")[0])
        return adapter is not None and adapter.path == card.root

    def _take_bases(self) -> None:
        known = set(self.catalog.conflicts())
        self.catalog = self._with_bases(self.catalog)
        for conflict in self.catalog.conflicts():
            if conflict not in known:
                log.error("%s", conflict)

    def _with_bases(self, catalog: Catalog) -> Catalog:
        return catalog.with_bases(base for member in self.members for base in member.bases)

    # --- metrics ---------------------------------------------------------------------

    def export(self) -> None:
        """Writes the gauges; called when they are asked for, not as the state changes."""
        metrics = self._shared.metrics
        resident = set()
        for member in self.members:
            metrics.upstream_up(member.name).set(member.health.up)
            for label, count in member.active.items():
                metrics.in_flight(label, member.name).set(count)
            for served in member.slots.residents:
                name = served.rpartition("@")[0]
                if name in self._adapters:
                    resident.add((name, member.name))
        for pair in self._exported | resident:
            metrics.resident(*pair).set(pair in resident)
        self._exported |= resident


def _candidate(member: Member, served: str | None) -> Candidate:
    """What routing needs to know of one upstream."""
    slots = member.slots
    return Candidate(
        name=member.name,
        up=member.health.up,
        resident=served is not None and slots.resident(served),
        loading=served is not None and slots.loading(served),
        free=slots.available,
        load=member.in_flight,
    )
