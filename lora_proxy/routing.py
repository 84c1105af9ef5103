"""Which upstreams are usable, and in which order to try them for one request.

Owns the order and the thresholds of health. Refuses to know how a candidate's facts are
come by, and what happens to a request: `rank` gives every candidate a place, the caller
goes down the list, and a retry is the next one.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum


@dataclass(frozen=True, slots=True)
class Candidate:
    """One upstream, as it looks to one request.

    Attributes:
        name: The upstream's name.
        up: Its health, as last heard.
        resident: It holds the adapter.
        loading: A load of the adapter is under way there.
        free: It has a slot for the adapter that is empty, or that an idle one can leave.
        load: Requests in flight there.
    """

    name: str
    up: bool
    resident: bool
    loading: bool
    free: bool
    load: int


class Tier(IntEnum):
    """How much stands between a candidate and the adapter's first token; less is better."""

    RESIDENT = 0  # nothing
    LOADING = 1  # the rest of a load
    FREE = 2  # a load
    FULL = 3  # somebody else's request, then a load

    @property
    def label(self) -> str:
        """The tier's name in metrics and logs."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate's name, and why it stands where it does."""

    name: str
    tier: Tier


def rank(adapter: str | None, candidates: Iterable[Candidate]) -> list[Ranked]:
    """Order the candidates for one request, best first; none is left out.

    1. What is up comes before what is down. A down one is tried last, not never: what we
       know of it may be old, and a refused connection costs less than a refused request.
    2. The lower tier. A base model needs no slot: every upstream is in the first tier.
    3. The lower load.
    4. Rendezvous: the higher hash of adapter and upstream. Every proxy comes to the same
       order without asking another, and an upstream that leaves moves only its own.

    Args:
        adapter: The adapter's name, the same for all its revisions, so that a new one
            lands where the old one was; None for a base model.
        candidates: In any order; the answer does not depend on it.
    """
    keyed = [
        (
            not candidate.up,
            _tier(adapter, candidate),
            candidate.load,
            -_affinity(adapter, candidate.name),
            candidate.name,
        )
        for candidate in candidates
    ]
    return [Ranked(name, tier) for _, tier, _, _, name in sorted(keyed)]


def _tier(adapter: str | None, candidate: Candidate) -> Tier:
    if adapter is None or candidate.resident:
        return Tier.RESIDENT
    if candidate.loading:
        return Tier.LOADING
    return Tier.FREE if candidate.free else Tier.FULL


def _affinity(adapter: str | None, upstream: str) -> int:
    """Hash a pair alike in every process, which Python's own `hash` does not."""
    # NUL stands in neither name, so no two pairs make the same bytes.
    pair = f"{adapter or ''}\0{upstream}".encode()
    return int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest())


@dataclass(frozen=True, slots=True)
class Health:
    """Whether one upstream is up, and what it takes to change that. Frozen: keep the result.

    Attributes:
        fall: Failures in a row that take an upstream down; at least 1.
        rise: Successes in a row that bring it up; at least 1.
        up: The verdict so far.
        streak: Results in a row that speak against the verdict.
        since: When the verdict last changed, in the caller's seconds; None if never.
    """

    fall: int = 3
    rise: int = 1
    up: bool = True
    streak: int = 0
    since: float | None = None

    def ok(self, now: float) -> "Health":
        """Return the health after a success."""
        return self._agrees() if self.up else self._objects(self.rise, now)

    def failed(self, now: float) -> "Health":
        """Return the health after a failure."""
        return self._objects(self.fall, now) if self.up else self._agrees()

    def _agrees(self) -> "Health":
        return replace(self, streak=0) if self.streak else self

    def _objects(self, threshold: int, now: float) -> "Health":
        if self.streak + 1 < threshold:
            return replace(self, streak=self.streak + 1)
        return replace(self, up=not self.up, streak=0, since=now)
