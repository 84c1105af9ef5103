"""In which order to try the upstreams for one request.

Owns the tiers, the bound on a holder's load, and the policies. Refuses to know how a
candidate's facts are come by, and what happens to a request: a policy gives every candidate
a place, the caller goes down the list, and a retry is the next one.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from math import log


@dataclass(frozen=True, slots=True)
class Candidate:
    """One upstream, as it looks to one request.

    Attributes:
        name: The upstream's name.
        usable: It may get requests now: its probes, its circuit and its operator agree.
        resident: It holds the adapter.
        busy: It holds the adapter, and is using it right now.
        loading: A load of the adapter is under way there, or waits for a slot.
        free: It has an empty slot for the adapter.
        evictable: It has a slot that an idle adapter can leave.
        load: Requests in flight there.
        weight: What it can carry, relative to the others; above 0. A returning upstream's
            is smaller for a while.
    """

    name: str
    usable: bool
    resident: bool
    busy: bool
    loading: bool
    free: bool
    evictable: bool
    load: int
    weight: float = 1.0


class Tier(IntEnum):
    """How much stands between a candidate and the adapter's first token; less is better."""

    BUSY = 0  # nothing, and the adapter is in a batch already
    RESIDENT = 1  # nothing
    LOADING = 2  # the rest of a load, or of the wait for one: others wait there already
    FREE = 3  # a load
    EVICTABLE = 4  # a load, and another one when the evicted adapter is next asked for
    FULL = 5  # the end of somebody else's request, then a load

    @property
    def label(self) -> str:
        """The tier's name in metrics and logs."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for, as far as the order depends on it.

    Attributes:
        adapter: The adapter's name, the same for all its revisions, so that a new one
            lands where the old one was; None for a base model, or no model at all.
        prefix: The beginning of the conversation, for prefix-affinity.
        turn: A counter, for round-robin.
    """

    adapter: str | None
    prefix: bytes = b""
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Spill:
    """When a holder has its hands full: its load with this request is above the bound.

    Attributes:
        factor: The bound, as a multiple of its share of all requests in flight, by weight.
        floor: The bound is never lower: so few requests are not worth a load elsewhere.
    """

    factor: float = 1.25
    floor: int = 16


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate's name, and why it stands where it does.

    Attributes:
        name: The upstream's name.
        tier: What it has of the adapter.
        spilled: It stands before a holder that would be before it, had that not been over
            its bound.
    """

    name: str
    tier: Tier
    spilled: bool = False


Policy = Callable[[Ask, Sequence[Candidate], Spill], list[Ranked]]
"""Orders the candidates for one request, best first, whatever order they come in.

None is left out. An unusable one is last, not gone: the caller sees that there is somebody
to wait for.
"""


# --- policies ------------------------------------------------------------------------------


def lora_affinity(ask: Ask, candidates: Sequence[Candidate], spill: Spill) -> list[Ranked]:
    """Where the adapter is, unless that upstream is far busier than the others.

    1. The usable before the unusable.
    2. Who has room for the request before who has not:
       a. An upstream over its bound has none. A holder then gives way to an upstream that
          has to load the adapter, and evict an idle one for it if need be: the load is paid
          once, and the next requests find two holders.
       b. A full upstream has none, and comes after those over their bound: a busy holder is
          already working down its queue, while in a full one even the load has to wait, for
          somebody else's last request.
    3. The lower tier. The busy holder before the idle one, so that an adapter's requests
       share batches and a copy that is needed no longer can be evicted; the bound makes
       the idle one busy when it is needed.
    4. The lower load for its weight.
    5. Weighted rendezvous. Every proxy comes to the same order without asking another, and
       an upstream that leaves moves only its own adapters.

    Every upstream holds a base model, and the bound is no matter: who has the least to do
    is the first in any case.
    """
    if ask.adapter is None:
        return least_loaded(ask, candidates, spill)
    adapter = ask.adapter

    def key(one: Candidate, tier: Tier) -> _Key:
        return tier, one.load / one.weight, _draw(adapter, one.name) / one.weight

    return _ordered(ask, candidates, key, spill)


def prefix_affinity(ask: Ask, candidates: Sequence[Candidate], spill: Spill) -> list[Ranked]:
    """Where this conversation was before, so that vLLM's prefix cache has its beginning.

    As `lora_affinity`, but in 3. the busy and the idle holder are alike, or a conversation
    would move whenever one of them comes to rest; and in place of 4. and 5. is the weighted
    rendezvous of adapter and prefix. The bound holds for base models too: a prefix that
    everybody shares does not bring everybody to one upstream.

    Without a prefix there is nothing to come back to: `lora_affinity`.
    """
    if not ask.prefix:
        return lora_affinity(ask, candidates, spill)
    # A digest, so that a long prefix is read once, and a NUL in it separates nothing.
    whole = b"\0".join(((ask.adapter or "").encode(), ask.prefix))
    conversation = hashlib.blake2b(whole, digest_size=16).digest()

    def key(one: Candidate, tier: Tier) -> _Key:
        place = _drawn(conversation, one.name) / one.weight
        return max(tier, Tier.RESIDENT), place, 0.0

    return _ordered(ask, candidates, key, spill)


def least_loaded(ask: Ask, candidates: Sequence[Candidate], _spill: Spill) -> list[Ranked]:
    """Who has the least to do for its weight, wherever the adapter is; ties by rendezvous."""
    adapter = ask.adapter or ""

    def key(one: Candidate, _tier: Tier) -> _Key:
        return 0, one.load / one.weight, _draw(adapter, one.name) / one.weight

    return _ordered(ask, candidates, key)


def round_robin(ask: Ask, candidates: Sequence[Candidate], _spill: Spill) -> list[Ranked]:
    """Each usable upstream in its turn, in the order of names, whatever it weighs."""
    usable = sorted(one.name for one in candidates if one.usable)
    start = ask.turn % len(usable) if usable else 0
    turns = {name: turn for turn, name in enumerate(usable[start:] + usable[:start])}

    def key(one: Candidate, _tier: Tier) -> _Key:
        return turns.get(one.name, 0), 0.0, 0.0

    return _ordered(ask, candidates, key)


POLICIES: dict[str, Policy] = {
    "lora-affinity": lora_affinity,
    "least-loaded": least_loaded,
    "round-robin": round_robin,
    "prefix-affinity": prefix_affinity,
}
"""By the names that the configuration has for them."""


# --- order -----------------------------------------------------------------------------------

_Key = tuple[int, float, float]
"""Where a policy puts a candidate that has room; the lowest first."""


def _ordered(
    ask: Ask,
    candidates: Sequence[Candidate],
    key: Callable[[Candidate, Tier], _Key],
    spill: Spill | None = None,
) -> list[Ranked]:
    """Steps 1. and 2. of `lora_affinity`, then the policy's own, then the name.

    Args:
        ask: What the tiers are for.
        candidates: Their names differ.
        key: The policy's own steps.
        spill: None leaves step 2. out.
    """
    if len(candidates) == 1:
        (one,) = candidates
        return [Ranked(one.name, _tier(ask, one))]
    share = 0.0 if spill is None else _share(candidates, spill)
    rows = []
    passed: tuple[int, float, float, str] | None = None  # the best holder over its bound
    for one in candidates:
        tier = _tier(ask, one)
        own = (*key(one, tier), one.name)
        roomless = False
        if spill is not None and one.usable:
            mine = one.load + 1
            over = mine > spill.floor and mine > share * one.weight
            if over and tier <= Tier.RESIDENT and (passed is None or own < passed):
                passed = own
            roomless = over or tier is Tier.FULL
        rows.append((not one.usable, roomless, own, tier))
    rows.sort()
    return [
        Ranked(own[-1], tier, not (unusable or roomless or passed is None or own < passed))
        for unusable, roomless, own, tier in rows
    ]


def _share(candidates: Sequence[Candidate], spill: Spill) -> float:
    """The load that a usable candidate of weight 1 may have, this request among it."""
    usable = [one for one in candidates if one.usable]
    load, weight = sum(one.load for one in usable), sum(one.weight for one in usable)
    return spill.factor * (load + 1) / weight if usable else 0.0


def _tier(ask: Ask, one: Candidate) -> Tier:
    if ask.adapter is None:
        return Tier.RESIDENT
    if one.resident:
        return Tier.BUSY if one.busy else Tier.RESIDENT
    if one.loading:
        return Tier.LOADING
    if one.free:
        return Tier.FREE
    return Tier.EVICTABLE if one.evictable else Tier.FULL


def _drawn(key: bytes, upstream: str) -> float:
    """A number above 0 for a pair, alike in every process, which Python's `hash` is not.

    It is exponentially distributed, with mean 1. Divided by weights, the least of several is
    one upstream's with a chance of its part of all weights: weighted rendezvous hashing.
    """
    # A NUL stands in no name, so no two pairs make the same bytes.
    digest = hashlib.blake2b(b"\0".join((key, upstream.encode())), digest_size=8).digest()
    # 52 bits and a half: the quotient is exact, and neither 0 nor 1.
    return -log(((int.from_bytes(digest) >> 12) + 0.5) / (1 << 52))


@lru_cache(maxsize=1 << 14)
def _draw(adapter: str, upstream: str) -> float:
    """`_drawn`, for the few pairs that come again and again."""
    return _drawn(adapter.encode(), upstream)
