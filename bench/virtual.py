"""A fleet of vLLM servers in virtual time, behind the proxy's own decisions.

Owns the events and the simulated servers. Refuses to decide anything that the proxy decides:
`routing` gives the order, `residency` the loads and evictions, `health` who may be used,
`retries` how often to try again. What `fleet`, `member` and `forward` do between those
decisions is done here without an event loop.

A server computes up to `batch` requests at once, each as fast as if it were alone; further
ones queue in it, first come first served. Loads do not slow it down, nor each other. When it
stops it ends what it was sent, refuses what is new, and breaks off its loads. The proxy is
not told: it finds out by its probes and by refused connections.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from random import Random
from statistics import fmean

from workload import Phase, Request, Scenario, load_times, phases, requests

from lora_proxy.errors import ProxyError
from lora_proxy.health import Health, Thresholds
from lora_proxy.residency import Command, Grant, Load, Refuse, Slots, Unload
from lora_proxy.retries import Budget
from lora_proxy.routing import Ask, Candidate, Policy, Ranked, Spill

ATTEMPTS = 3  # upstreams tried for one request; the proxy's default
PROBE_INTERVAL = 5.0  # seconds; the proxy's default
UNLOAD = 0.05  # seconds
REFUSAL = 0.001  # seconds until a call to a server that is gone has failed
SAMPLE = 1.0  # seconds between two looks at the spread of the load


@dataclass(slots=True)
class Tally:
    """What became of the requests that arrived in one phase.

    Attributes:
        requests: How many arrived.
        failed: Without an answer.
        retries: Sent again to a further upstream.
        spilled: Sent past a holder that was over its bound.
        loads: Begun in the phase, whoever asked for them.
        waits: Seconds from the arrival to a place in a batch, with the adapter resident.
        returning: Of a conversation that was seen before.
        returned: Of these, sent where that conversation was last.
        peaks: The greatest number of requests in flight on one upstream, as a multiple of
            the mean of all that the proxy holds for up; one look per second.
    """

    requests: int = 0
    failed: int = 0
    retries: int = 0
    spilled: int = 0
    loads: int = 0
    waits: list[float] = field(default_factory=list)
    returning: int = 0
    returned: int = 0
    peaks: list[float] = field(default_factory=list)

    def wait(self, part: float) -> float:
        """The wait that this part of the answered requests did not exceed (nearest rank)."""
        ordered = sorted(self.waits)
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0

    def per_thousand(self, events: int) -> float:
        """So many events per 1,000 requests."""
        return 1000 * events / self.requests if self.requests else 0.0

    @property
    def imbalance(self) -> float:
        """The mean of `peaks`; 1 is a perfect spread."""
        return fmean(self.peaks) if self.peaks else 0.0

    @property
    def came_back(self) -> float:
        """The part of returning requests that found their conversation's prefix cache."""
        return self.returned / self.returning if self.returning else 0.0


@dataclass(slots=True, eq=False)
class _Flight:
    """One request on its way; also its own ticket."""

    request: Request
    tally: Tally
    ranked: Sequence[Ranked]
    attempts: int = 0
    trial: bool = False


class _Upstream:
    """One simulated server, and what the proxy knows of it.

    Attributes:
        running: It accepts connections.
        life: How often it was stopped; tells what was begun before from what came after.
        computing: Requests in the batch.
        backlog: Requests that it was sent, and does not compute yet.
        in_flight: Leases that the proxy has given out.
        loading: Its loads under way.
        unloading: Its unloads under way.
    """

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = Slots(slots)
        self.health = Health(Thresholds(), up=True)
        self.running = True
        self.life = 0
        self.computing = 0
        self.backlog: deque[_Flight] = deque()
        self.in_flight = 0
        self.loading: set[str] = set()
        self.unloading: set[str] = set()
        self._stranger: Candidate | None = None

    def candidate(self, served: str, now: float) -> Candidate:
        """As `fleet` describes a member to the policy."""
        slots = self.slots
        weight = self.health.share(now)
        resident, loading = slots.resident(served), slots.coming(served)
        stranger = self._stranger
        if stranger is None or stranger.weight != weight:
            available = slots.available
            stranger = self._stranger = Candidate(
                name=self.name,
                usable=True,
                resident=False,
                busy=False,
                loading=False,
                free=available and slots.free != 0,
                evictable=available,
                load=self.in_flight + slots.waiting,
                weight=weight,
            )
        if not resident and not loading:
            return stranger
        return Candidate(
            name=self.name,
            usable=True,
            resident=resident,
            busy=slots.leases(served) > 0,
            loading=loading,
            free=stranger.free,
            evictable=stranger.evictable,
            load=stranger.load,
            weight=weight,
        )

    def changed(self) -> None:
        """What a stranger sees of it is to be looked at anew."""
        self._stranger = None


class VirtualFleet:
    """One run of one scenario under one policy.

    Args:
        scenario: What happens.
        policy: Orders the candidates.
        spill: When a holder has its hands full.
    """

    def __init__(self, scenario: Scenario, policy: Policy, spill: Spill) -> None:
        self._scenario = scenario
        self._policy = policy
        self._spill = spill
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()
        self._turns = count()
        self._chance = Random(f"{scenario.seed} jitter")
        self._budget = Budget()
        self._load_times = load_times(scenario)
        self._upstreams = {
            name: _Upstream(name, scenario.slots)
            for name in (f"gpu-{n}" for n in range(scenario.upstreams))
        }
        self._homes: dict[tuple[str, bytes], str] = {}  # conversation -> where it was last
        self._tallies = {phase.name: Tally() for phase in phases(scenario)}
        self._tally = Tally()  # the present phase's
        self._under_way = 0
        self._end = phases(scenario)[-1].end  # of arrivals; some requests end later

    def run(self) -> dict[str, Tally]:
        """Plays all requests to their ends; returns what became of them, by phase."""
        plan = phases(self._scenario)
        for phase in plan:
            self._after(phase.start, partial(self._enter, phase))
        for upstream in self._upstreams.values():
            # At any time of the interval, as if they had been probed for long.
            self._after(PROBE_INTERVAL * self._chance.random(), partial(self._probe, upstream))
        self._restart(plan[-1].start)
        self._after(SAMPLE, self._sample)
        for request in requests(self._scenario):
            self._play(until=request.at)
            self._now = request.at
            self._arrive(request)
        while self._under_way:
            self._step()
        return self._tallies

    # --- time ------------------------------------------------------------------------------

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heappush(self._events, (self._now + seconds, next(self._serial), event))

    def _play(self, until: float) -> None:
        while self._events[0][0] <= until:  # never empty: probes go on for ever
            self._step()

    def _step(self) -> None:
        self._now, _, event = heappop(self._events)
        event()

    def _enter(self, phase: Phase) -> None:
        self._tally = self._tallies[phase.name]

    # --- route, lease, forward ---------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        ask = Ask(request.adapter, request.prefix, next(self._turns))
        now = self._now
        candidates = [
            upstream.candidate(request.adapter, now)
            for upstream in self._upstreams.values()
            if upstream.health.usable(now)
        ]
        tally = self._tally
        tally.requests += 1
        ranked = self._policy(ask, candidates, self._spill)
        if not ranked:
            tally.failed += 1
            return
        tally.spilled += ranked[0].spilled
        self._budget.deposit()
        self._under_way += 1
        self._try(_Flight(request, tally, ranked[:ATTEMPTS]))

    def _try(self, flight: _Flight) -> None:
        """The next upstream of its order."""
        upstream = self._upstreams[flight.ranked[flight.attempts].name]
        flight.attempts += 1
        self._run(upstream, upstream.slots.acquire(flight, flight.request.adapter, self._now))

    def _try_again(self, flight: _Flight) -> None:
        if flight.attempts == len(flight.ranked) or not self._budget.spend():
            flight.tally.failed += 1
            self._under_way -= 1
            return
        flight.tally.retries += 1
        self._try(flight)

    def _granted(self, upstream: _Upstream, flight: _Flight) -> None:
        if not upstream.running:  # the connection is refused
            upstream.health.probe_failed()
            self._run(upstream, upstream.slots.release(flight))
            self._try_again(flight)
            return
        flight.trial = upstream.health.begin()
        upstream.in_flight += 1
        conversation = (flight.request.adapter, flight.request.prefix)
        home = self._homes.get(conversation)
        flight.tally.returning += home is not None
        flight.tally.returned += home == upstream.name
        self._homes[conversation] = upstream.name
        upstream.backlog.append(flight)
        self._compute(upstream)

    def _compute(self, upstream: _Upstream) -> None:
        while upstream.backlog and upstream.computing < self._scenario.batch:
            flight = upstream.backlog.popleft()
            upstream.computing += 1
            upstream.health.succeeded(self._now, trial=flight.trial)
            flight.tally.waits.append(self._now - flight.request.at)
            self._after(flight.request.service, partial(self._finish, upstream, flight))

    def _finish(self, upstream: _Upstream, flight: _Flight) -> None:
        self._under_way -= 1
        upstream.computing -= 1
        upstream.in_flight -= 1
        self._run(upstream, upstream.slots.release(flight))
        self._compute(upstream)

    # --- residency's commands ------------------------------------------------------------------

    def _run(self, upstream: _Upstream, commands: Iterable[Command]) -> None:
        upstream.changed()
        for command in commands:
            match command:
                case Grant(ticket=_Flight() as flight):
                    self._granted(upstream, flight)
                case Refuse(ticket=_Flight() as flight):
                    self._try_again(flight)
                case Load(served=served):
                    self._load(upstream, served)
                case Unload(module=module):
                    self._unload(upstream, module)

    def _load(self, upstream: _Upstream, served: str) -> None:
        if not upstream.running:
            self._after(REFUSAL, partial(self._load_refused, upstream, served))
            return
        self._tally.loads += 1
        upstream.loading.add(served)
        done = partial(self._loaded, upstream, served, upstream.life)
        self._after(self._load_times[served], done)

    def _loaded(self, upstream: _Upstream, served: str, life: int) -> None:
        if life == upstream.life:
            upstream.loading.remove(served)
            self._run(upstream, upstream.slots.loaded(served))

    def _load_refused(self, upstream: _Upstream, served: str) -> None:
        upstream.health.probe_failed()
        error = ProxyError("upstream_connect", f"{upstream.name} is down")
        self._run(upstream, upstream.slots.load_failed(served, error, self._now))

    def _unload(self, upstream: _Upstream, module: str) -> None:
        upstream.unloading.add(module)
        done = partial(self._unloaded, upstream, module, upstream.life)
        self._after(UNLOAD if upstream.running else REFUSAL, done)

    def _unloaded(self, upstream: _Upstream, module: str, life: int) -> None:
        if life == upstream.life:
            upstream.unloading.remove(module)
            self._run(upstream, upstream.slots.unloaded(module))

    # --- restarts and probes -------------------------------------------------------------------

    def _restart(self, start: float) -> None:
        for turn, upstream in enumerate(self._upstreams.values()):
            self._after(start + turn * self._scenario.stagger, partial(self._stop, upstream))

    def _stop(self, upstream: _Upstream) -> None:
        upstream.running = False
        upstream.life += 1
        self._after(self._scenario.downtime, partial(self._come_back, upstream))
        for module in sorted(upstream.unloading):
            self._run(upstream, upstream.slots.unloaded(module))
        upstream.unloading.clear()
        broken = sorted(upstream.loading)
        upstream.loading.clear()
        for served in broken:
            self._load_refused(upstream, served)

    def _come_back(self, upstream: _Upstream) -> None:
        upstream.running = True

    def _probe(self, upstream: _Upstream) -> None:
        health = upstream.health
        if not upstream.running:
            health.probe_failed()
        elif health.probe_ok(self._now):
            # What it lists is nothing: it has just been started.
            slots = upstream.slots
            self._run(upstream, slots.reported({}, slots.marker()))
        jitter = self._chance.uniform(0.9, 1.1)
        self._after(health.next_probe(PROBE_INTERVAL, jitter), partial(self._probe, upstream))

    # --- measurement -----------------------------------------------------------------------------

    def _sample(self) -> None:
        loads = [one.in_flight for one in self._upstreams.values() if one.health.up]
        if any(loads):
            self._tally.peaks.append(max(loads) / fmean(loads))
        if self._now < self._end:
            self._after(SAMPLE, self._sample)
