"""One upstream's adapters: who may use which, what to load next and what to unload for it.

Owns what the proxy believes one vLLM server holds, and the leases on it. Refuses to know
HTTP, time's source, files and the catalog: a served name is a string, a ticket is whatever
the caller tells its requests apart by. Facts and wishes come in, commands go out; nothing
here waits, so every method leaves the state consistent and a cancelled request is one more
`release`.

The caller carries out the commands in order and answers each `Load` with exactly one
`loaded` or `load_failed`, each `Unload` with exactly one `unloaded`, and each granted or
waiting ticket with one `release`.

Theory of operation
-------------------
A served name is in one of six states, and which dict holds it says which:

    absent     no dict          nobody wants it here, or the server forgot it
    queued     _queue           wanted, and there is no slot for it yet
    loading    _loading         its one `Load` is under way; requests wait for it
    resident   _resident        the server knows it; also in `_idle` while nobody uses it
    unloading  _unloading       its `Unload` is under way
    failed     _failures        absent, and why the last load went wrong

    absent ─acquire→ queued ─slot→ loading ─loaded→ resident ─evicted, retired, idle→ unloading
                                      └─load_failed→ failed      resident ─lost→ absent

Only one pair overlaps: a name asked for while its own unload is under way is queued and
unloading, and is loaded when the unload has ended. `reported` moves a name straight to
resident or to absent.

Slots. Loading, resident and unloading names occupy one each; a `Load` is only sent while
that is within the capacity. A full server evicts the adapter that has been idle longest,
and the slot goes to the queue's head once the unload has ended. Where nothing is idle the
queue waits, first come first served, for a release. What other clients of the server have
loaded can put it over capacity, and so can a load beside the predecessor that it takes over
from; then the surplus goes when a slot is next needed. A pinned name is never idle.

Order of events. The server's list of adapters takes a while to arrive, so it can be older
than what happened here meanwhile. Every change of a name's presence therefore takes the
next number; `marker` reads the counter, and `reported` leaves alone what has a higher
number than the marker taken before asking. The number a name became resident with is its
generation: a 404 speaks about one generation, and cannot take away its successor.
"""

import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from lora_proxy.errors import ProxyError

REMEMBERED = 1024
"""How many failures, and how many departures, one upstream remembers; the oldest go first."""

Ticket = Hashable


@dataclass(frozen=True, slots=True)
class Grant:
    """`ticket` now holds a lease.

    Attributes:
        ticket: Whose lease it is.
        module: What to write into the request's `model`: the served name, or the name
            under which the server already had the adapter.
        generation: To be handed to `lost` if the server denies knowing the module.
    """

    ticket: Ticket
    module: str
    generation: int


@dataclass(frozen=True, slots=True)
class Load:
    """Load this served name; answer with `loaded` or `load_failed`."""

    served: str


Reason = Literal["evicted", "retired", "idle"]
"""Why something is unloaded: for its slot, for good, or because nobody asked for long."""


@dataclass(frozen=True, slots=True)
class Unload:
    """Unload this module, whatever name it was served under; answer with `unloaded`."""

    module: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refuse:
    """`ticket` gets this error; it holds nothing and need not be released.

    One error object answers many tickets, now and from the negative cache.
    """

    ticket: Ticket
    error: ProxyError


Command = Grant | Load | Unload | Refuse

_Waiters = dict[Ticket, None]
"""An ordered set: first come, first granted; any one can leave cheaply."""


@dataclass(slots=True, eq=False)
class _Resident:
    """One stay of one served name; leases point here, so that they outlive its loss."""

    served: str
    module: str
    generation: int
    leases: int = 0
    age: int = 0  # sweeps that it has been idle for


@dataclass(frozen=True, slots=True)
class _Failure:
    error: ProxyError
    retry_at: float | None


class Slots:
    """The adapter slots of one upstream.

    Args:
        capacity: How many adapters may be resident, loading or unloading at once;
            None for no bound.

    Raises:
        ValueError: If `capacity` is below one.
    """

    __slots__ = (
        "_changes",
        "_departed",
        "_failures",
        "_horizon",
        "_idle",
        "_leases",
        "_limit",
        "_loading",
        "_pinned",
        "_queue",
        "_resident",
        "_retired",
        "_unloading",
        "_waiting",
        "capacity",
    )

    def __init__(self, capacity: int | None) -> None:
        self._queue: dict[str, _Waiters] = {}
        self._loading: dict[str, _Waiters] = {}
        self._resident: dict[str, _Resident] = {}
        self._idle: dict[str, _Resident] = {}  # longest idle first
        self._unloading: dict[str, str] = {}  # module -> served name
        self._failures: dict[str, _Failure] = {}
        self._pinned: set[str] = set()  # never idle, so never evicted
        self._retired: set[str] = set()  # queued, loading or resident, and to go after use
        self._leases: dict[Ticket, _Resident] = {}
        self._waiting: dict[Ticket, str] = {}  # ticket -> served name, queued or loading
        self._changes = 0
        self._departed: dict[str, int] = {}  # served name -> the change that made it absent
        self._horizon = 0  # the newest change that `_departed` no longer remembers
        self.resize(capacity)

    # -- requests ---------------------------------------------------------------------

    def acquire(
        self, ticket: Ticket, served: str, now: float, *, beside: bool = False
    ) -> list[Command]:
        """Ask for a lease on `served`; its Grant or Refuse comes now or from a later call.

        1. It is resident: grant.
        2. It is loading: wait for that load.
        3. It is queued: wait with the others.
        4. Its last load failed, for good or until later than `now`: refuse.
        5. It is to be loaded beside its predecessor: load, over the capacity if need be.
        6. Otherwise queue it, and then
           a. a slot is free: load;
           b. an adapter is idle: unload that one first;
           c. all are in use: wait for a release.

        A retired name that is asked for is retired no longer.

        Args:
            ticket: New, or released since it was last used.
            served: The served name.
            now: Seconds on the clock that `load_failed`'s `retry_at` is read from.
            beside: It takes over from a name that is resident here and will be retired.
                Waiting for that one's slot would be waiting for ever.

        Raises:
            ValueError: If `ticket` already holds a lease or waits for one.
        """
        if ticket in self._leases or ticket in self._waiting:
            raise ValueError(f"ticket {ticket!r} is in use")
        self._retired.discard(served)
        # 1.
        resident = self._resident.get(served)
        if resident is not None:
            return [self._grant(ticket, resident)]
        # 2. and 3.
        for waiters in (self._loading.get(served), self._queue.get(served)):
            if waiters is not None:
                self._wait(ticket, served, waiters)
                return []
        # 4.
        error = self.failure(served, now)
        if error is not None:
            # Raised again and again, one exception would collect every raiser's frames.
            return [Refuse(ticket, error.with_traceback(None))]
        # 5.
        if beside and served not in self._unloading.values():
            self._wait(ticket, served, self._loading.setdefault(served, {}))
            return [Load(served)]
        # 6.
        self._wait(ticket, served, self._queue.setdefault(served, {}))
        return self._schedule()

    def release(self, ticket: Ticket) -> list[Command]:
        """End a lease, or withdraw a ticket that waits; any other ticket is no matter.

        A name that nobody waits for any more leaves the queue. A load under way goes on:
        the server cannot be stopped, and the adapter is then simply resident and idle.
        """
        resident = self._leases.pop(ticket, None)
        if resident is None:
            self._withdraw(ticket)
            return []
        resident.leases -= 1
        if resident.leases or self._resident.get(resident.served) is not resident:
            return []
        return [*self._rest(resident), *self._schedule()]

    # -- what the server did ------------------------------------------------------------

    def loaded(self, served: str, module: str | None = None) -> list[Command]:
        """A `Load` is done: grant everybody who waits.

        Args:
            served: The served name that was to be loaded.
            module: The name under which the server had this adapter already, if it is
                not the served name.
        """
        waiters = self._loading.pop(served, None)
        if waiters is None:
            return []
        return [*self._arrive(served, module or served, waiters), *self._schedule()]

    def load_failed(self, served: str, error: ProxyError, retry_at: float | None) -> list[Command]:
        """A `Load` failed: refuse everybody who waits, and who comes too early.

        Args:
            served: The served name that was to be loaded.
            error: What each of them is told.
            retry_at: When a new load may be tried; None: never, unless forgiven.
        """
        waiters = self._loading.pop(served, None)
        if waiters is None:
            return []
        self._failures.pop(served, None)
        self._failures[served] = _Failure(error, retry_at)
        if len(self._failures) > REMEMBERED:
            del self._failures[next(iter(self._failures))]
        self._retired.discard(served)
        self._depart(served)
        for ticket in waiters:
            del self._waiting[ticket]
        return [*(Refuse(ticket, error) for ticket in waiters), *self._schedule()]

    def unloaded(self, module: str) -> list[Command]:
        """An `Unload` has ended, well or not: its slot is free.

        If the server kept the module after all, `reported` will learn it again.
        """
        served = self._unloading.pop(module, None)
        if served is None:
            return []
        self._depart(served)
        return self._schedule()

    def lost(self, served: str, generation: int) -> list[Command]:
        """The server answered that it does not know the module of this generation.

        Of many such answers the first counts; the others speak of a stay that is over.
        Leases on it stay valid tickets, and are released as usual.
        """
        resident = self._resident.get(served)
        if resident is None or resident.generation != generation:
            return []
        self._forget(resident)
        return self._schedule()

    def marker(self) -> int:
        """Return the point in time, for `reported`, before the server is asked."""
        return self._changes

    def reported(self, listed: Mapping[str, str], since: int) -> list[Command]:
        """Reconcile with what the server says it holds.

        What changed after `since`, and what is being loaded or unloaded, is left alone.
        Otherwise a resident name that is not listed, or under another module, is
        forgotten, and a listed one that was not known is resident from now on. After a
        restart that lost everything: `reported({}, marker())`.

        Args:
            listed: Served name -> the module it is served as, for every known adapter
                in the server's list.
            since: The `marker` taken before the server was asked.
        """
        stale = [
            resident
            for served, resident in self._resident.items()
            if resident.generation <= since and listed.get(served) != resident.module
        ]
        news = [item for item in listed.items() if self._is_news(*item, since)]
        for resident in stale:
            self._forget(resident)
        commands: list[Command] = []
        for served, module in news:
            commands += self._arrive(served, module, self._queue.pop(served, {}))
        return commands + self._schedule()

    # -- what the operator wants ----------------------------------------------------------

    def retire(self, served: str) -> list[Command]:
        """Unload `served` as soon as nobody uses it; who waits for it still gets it."""
        self._pinned.discard(served)
        resident = self._resident.get(served)
        if resident is not None and not resident.leases:
            return [*self._unload(resident, "retired"), *self._schedule()]
        if served in self._resident or served in self._loading or served in self._queue:
            self._retired.add(served)
        return []

    def pin(self, served: str) -> None:
        """Never evict `served`, nor let it go for being idle; it need not be resident yet."""
        self._pinned.add(served)
        self._idle.pop(served, None)

    def unpin(self, served: str) -> list[Command]:
        """Treat `served` as any other again."""
        self._pinned.discard(served)
        resident = self._resident.get(served)
        if resident is None or resident.leases:
            return []
        return [*self._rest(resident), *self._schedule()]

    def sweep(self, age: int) -> list[Command]:
        """Unload what nobody has used for `age` sweeps in full; to be called regularly."""
        commands: list[Command] = []
        for resident in tuple(self._idle.values()):
            resident.age += 1
            if resident.age > age:
                commands += self._unload(resident, "idle")
        return commands + self._schedule()

    def resize(self, capacity: int | None) -> list[Command]:
        """Change the capacity; what is over it goes when a slot is next needed.

        Raises:
            ValueError: If `capacity` is below one.
        """
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.capacity = capacity
        self._limit = sys.maxsize if capacity is None else capacity
        return self._schedule()

    def forgive(self, served: str) -> None:
        """Forget that `served` failed: the next `acquire` tries again."""
        self._failures.pop(served, None)

    # -- readings -------------------------------------------------------------------------

    def resident(self, served: str) -> bool:
        """Whether the server is believed to know `served` now."""
        return served in self._resident

    def loading(self, served: str) -> bool:
        """Whether a load of `served` is under way; queueing for a slot is not loading."""
        return served in self._loading

    def coming(self, served: str) -> bool:
        """Whether somebody waits for `served`, for its load or for a slot: it will be here."""
        return served in self._loading or served in self._queue

    def leases(self, served: str) -> int:
        """How many leases the present stay of `served` has."""
        resident = self._resident.get(served)
        return 0 if resident is None else resident.leases

    def failure(self, served: str, now: float) -> ProxyError | None:
        """Return why `served` would be refused at `now`, if it would."""
        failure = self._failures.get(served)
        if failure is None or (failure.retry_at is not None and failure.retry_at <= now):
            return None
        return failure.error

    @property
    def residents(self) -> dict[str, str]:
        """What is resident: served name -> the module under which the server has it."""
        return {served: resident.module for served, resident in self._resident.items()}

    @property
    def busy(self) -> int:
        """How many residents have a lease."""
        return sum(1 for resident in self._resident.values() if resident.leases)

    @property
    def waiting(self) -> int:
        """How many tickets wait, for a load or for a slot."""
        return len(self._waiting)

    @property
    def free(self) -> int | None:
        """How many slots are empty; None where their number has no bound."""
        return None if self.capacity is None else max(0, self._spare())

    @property
    def available(self) -> bool:
        """Whether one more name would get a slot without waiting for any lease to end."""
        return self._coming() + len(self._idle) > len(self._queue)

    # -- slots ------------------------------------------------------------------------------

    def _spare(self) -> int:
        """Empty slots; negative where other clients of the server loaded too many."""
        return self._limit - len(self._resident) - len(self._loading) - len(self._unloading)

    def _coming(self) -> int:
        """Slots that are empty, or will be without a further decision."""
        return self._spare() + len(self._unloading)

    def _schedule(self) -> list[Command]:
        """Give the queue the empty slots, and evict for what got none."""
        commands: list[Command] = []
        while self._queue:
            commands += self._start()
            if len(self._queue) <= self._coming() or not self._idle:
                break
            commands += self._unload(next(iter(self._idle.values())), "evicted")
        return commands

    def _start(self) -> list[Load]:
        """Start as many loads as there are empty slots, in the queue's order.

        A name whose own unload is still under way is passed over: the two calls would
        race on the server.
        """
        leaving = self._unloading.values()
        ready = (served for served in self._queue if served not in leaving)
        chosen = list(islice(ready, max(0, self._spare())))
        for served in chosen:
            self._loading[served] = self._queue.pop(served)
        return [Load(served) for served in chosen]

    def _unload(self, resident: _Resident, reason: Reason) -> list[Unload]:
        """Take an idle adapter's slot away.

        Two served names can share one module, where two adapters were adopted from one
        folder. It goes when the last of them does.
        """
        shared = resident.module in self._unloading or any(
            other.module == resident.module and other is not resident
            for other in self._resident.values()
        )
        if shared:
            self._forget(resident)
            return []
        self._drop(resident)
        self._unloading[resident.module] = resident.served
        return [Unload(resident.module, reason)]

    # -- steps of one name ------------------------------------------------------------------

    def _wait(self, ticket: Ticket, served: str, waiters: _Waiters) -> None:
        waiters[ticket] = None
        self._waiting[ticket] = served

    def _withdraw(self, ticket: Ticket) -> None:
        served = self._waiting.pop(ticket, None)
        if served is None:
            return
        if served in self._loading:
            del self._loading[served][ticket]
            return
        waiters = self._queue[served]
        del waiters[ticket]
        if not waiters:
            del self._queue[served]
            self._retired.discard(served)

    def _grant(self, ticket: Ticket, resident: _Resident) -> Grant:
        if not resident.leases:
            self._idle.pop(resident.served, None)
        resident.leases += 1
        self._leases[ticket] = resident
        return Grant(ticket, resident.module, resident.generation)

    def _arrive(self, served: str, module: str, waiters: Iterable[Ticket]) -> list[Command]:
        """Begin a stay of `served`: it is resident, and whoever waits has a lease."""
        self._changes += 1
        resident = _Resident(served, module, self._changes)
        self._resident[served] = resident
        self._failures.pop(served, None)
        commands: list[Command] = []
        for ticket in waiters:
            del self._waiting[ticket]
            commands.append(self._grant(ticket, resident))
        return commands or self._rest(resident)

    def _rest(self, resident: _Resident) -> list[Command]:
        """Let a resident that nobody uses be idle, or go if it is retired."""
        if resident.served in self._retired:
            return [*self._unload(resident, "retired")]
        if resident.served not in self._pinned:
            resident.age = 0
            self._idle[resident.served] = resident
        return []

    def _forget(self, resident: _Resident) -> None:
        """End a stay without a call to the server."""
        self._drop(resident)
        self._depart(resident.served)

    def _drop(self, resident: _Resident) -> None:
        del self._resident[resident.served]
        self._idle.pop(resident.served, None)
        self._retired.discard(resident.served)

    def _depart(self, served: str) -> None:
        """Number the change that made `served` absent."""
        self._changes += 1
        self._departed.pop(served, None)
        self._departed[served] = self._changes
        if len(self._departed) > REMEMBERED:
            self._horizon = self._departed.pop(next(iter(self._departed)))

    def _is_news(self, served: str, module: str, since: int) -> bool:
        """Whether a listed module is one that we should have known at `since`."""
        if served in self._loading or served in self._unloading.values():
            return False
        resident = self._resident.get(served)
        if resident is None:
            return self._departed.get(served, self._horizon) <= since
        return resident.generation <= since and resident.module != module
