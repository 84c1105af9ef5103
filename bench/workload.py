"""What is asked of the simulated fleet, and when: adapters, conversations, a crowd, restarts.

Owns the scenario, its phases and its requests. Refuses to know who answers them: one seed
makes the same requests for every policy, down to how long each is computed.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import log
from random import Random


@dataclass(frozen=True, slots=True)
class Scenario:
    """The fleet, its load, and what happens to both. Times in seconds.

    Attributes:
        upstreams: How many there are, all alike.
        slots: Adapters that each may hold.
        batch: Requests that each computes at once; further ones queue inside it.
        adapters: How many there are; the n-th is asked for as often as 1 / n ** exponent.
        exponent: Of the Zipf law.
        conversations: Per adapter, each as often as any other; what prefix-affinity goes by.
        utilisation: The part of all batches' places that is in use on average.
        service: A request's time in the batch, on average; lognormal.
        sigma: The standard deviation of that time's logarithm.
        load_least: An adapter's load takes this or more, always the same for one adapter.
        load_most: Its upper end.
        crowd_rank: The adapter that a crowd comes for, by popularity; 1 is the first.
        crowd_share: Its part of the requests then; their total stays as it is.
        crowd_time: For how long.
        calm: Between the crowd and the restarts; not reported.
        downtime: Each upstream is gone once, for so long, and comes back empty.
        down_at_once: So many are gone at any time during the restarts.
        requests: In all phases together.
        seed: For everything that is random.
    """

    upstreams: int = 64
    slots: int = 16
    batch: int = 16
    adapters: int = 10_000
    exponent: float = 1.0
    conversations: int = 8
    utilisation: float = 0.65
    service: float = 2.0
    sigma: float = 0.6
    load_least: float = 0.5
    load_most: float = 1.0
    crowd_rank: int = 500
    crowd_share: float = 0.3
    crowd_time: float = 60.0
    calm: float = 15.0
    downtime: float = 45.0
    down_at_once: int = 8
    requests: int = 200_000
    seed: int = 1

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.utilisation * self.upstreams * self.batch / self.service

    @property
    def stagger(self) -> float:
        """Seconds from one upstream's restart to the next one's."""
        return self.downtime / self.down_at_once


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time with something of its own to look at."""

    name: str
    start: float
    end: float


WARM_UP, STEADY, CROWD, CALM, RESTARTS = "warm-up", "steady", "flash crowd", "calm", "restarts"
REPORTED = (STEADY, CROWD, RESTARTS)
"""The phases that say something of a policy; the others only lead from one to the next."""


def phases(scenario: Scenario) -> list[Phase]:
    """One after another, from time 0.

    The crowd and the restarts last as long as they do. Of what is left, a third fills the
    empty fleet, and two thirds are the steady phase.

    Raises:
        ValueError: If the scenario's requests do not last for all phases.
    """
    restarts = scenario.stagger * (scenario.upstreams - 1) + scenario.downtime
    fixed = scenario.crowd_time + scenario.calm + restarts
    rest = scenario.requests / scenario.rate - fixed
    if rest < scenario.crowd_time:
        least = round((fixed + scenario.crowd_time) * scenario.rate)
        raise ValueError(f"{scenario.requests} requests are too few; take {least} or more")
    found = []
    start = 0.0
    for name, length in (
        (WARM_UP, rest / 3),
        (STEADY, rest * 2 / 3),
        (CROWD, scenario.crowd_time),
        (CALM, scenario.calm),
        (RESTARTS, restarts),
    ):
        found.append(Phase(name, start, start + length))
        start += length
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """One request, whoever answers it.

    Attributes:
        at: When it arrives.
        adapter: What it asks for.
        prefix: The beginning of its conversation.
        service: Seconds in the batch.
    """

    at: float
    adapter: str
    prefix: bytes
    service: float


def adapter_name(rank: int) -> str:
    """The adapter that is the rank-th by popularity; 1 is the first."""
    return f"a-{rank}"


def load_times(scenario: Scenario) -> dict[str, float]:
    """How long each adapter's load takes."""
    chance = Random(f"{scenario.seed} loads")
    return {
        adapter_name(rank): chance.uniform(scenario.load_least, scenario.load_most)
        for rank in range(1, scenario.adapters + 1)
    }


def requests(scenario: Scenario) -> Iterator[Request]:
    """All requests, in the order of their arrival: a Poisson process."""
    chance = Random(f"{scenario.seed} requests")
    ranks = range(1, scenario.adapters + 1)
    weights = list(accumulate(rank**-scenario.exponent for rank in ranks))
    mean = log(scenario.service) - scenario.sigma**2 / 2
    crowd = next(phase for phase in phases(scenario) if phase.name == CROWD)
    at = 0.0
    for _ in range(scenario.requests):
        at += chance.expovariate(scenario.rate)
        (rank,) = chance.choices(ranks, cum_weights=weights)
        joins = chance.random() < scenario.crowd_share
        if joins and crowd.start <= at < crowd.end:
            rank = scenario.crowd_rank
        conversation = chance.randrange(scenario.conversations)
        service = chance.lognormvariate(mean, scenario.sigma)
        yield Request(at, adapter_name(rank), b"conversation %d" % conversation, service)


def shared_cache(scenario: Scenario) -> dict[str, float]:
    """Loads per 1,000 requests, by phase, of one LRU cache with all the fleet's slots.

    What a fleet would need that keeps each adapter once, never restarts, and computes any
    request anywhere: a mark to measure the policies by, not one that can be reached.
    """
    capacity = scenario.upstreams * scenario.slots
    cache: OrderedDict[str, None] = OrderedDict()
    asked = dict.fromkeys((phase.name for phase in phases(scenario)), 0)
    loaded = dict(asked)
    plan = iter(phases(scenario))
    phase = next(plan)
    for request in requests(scenario):
        while request.at >= phase.end and (following := next(plan, None)) is not None:
            phase = following
        asked[phase.name] += 1
        if request.adapter in cache:
            cache.move_to_end(request.adapter)
            continue
        loaded[phase.name] += 1
        cache[request.adapter] = None
        if len(cache) > capacity:
            cache.popitem(last=False)
    return {name: 1000 * loaded[name] / max(1, asked[name]) for name in asked}
