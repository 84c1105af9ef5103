"""Limits of concurrent requests per upstream, and one bounded, fair queue in front of them.

Owns the places: who holds one is counted, who waits for one is known by a ticket. Refuses to
know what a request is, why it may use which upstreams, and how long it waits: timing out is
one more `withdraw`. Nothing here waits; every method leaves the state consistent, and returns
who got a place by it.

Theory of operation
-------------------
A ticket waits for the first place on any of several upstreams, and stands in the line of each:

    line of gpu-0     sql: 1 2 5     chat: 3          the next place on gpu-0 is 1's
    line of gpu-1     chat: 3 4      sql: 5           the next place on gpu-1 is 3's

In a line adapters have turns: the first one's oldest ticket gets the place, and its adapter
goes to the end. An adapter that floods the proxy waits for itself: one ticket of another has
its turn after at most one of each adapter before it. An adapter whose tickets have all left a
line comes to its end anew, so that nothing is gained by coming and going.

A free place and a ticket that could use it never exist together: places are handed over as
they become free, and a ticket is taken in only where all its upstreams are at their limits.
That is why a free place may be taken by whoever comes, without a look at the line.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Ticket = Hashable


@dataclass(frozen=True, slots=True)
class Admit:
    """`ticket` waits no longer: it holds a place on `upstream`."""

    ticket: Ticket
    upstream: str


@dataclass(frozen=True, slots=True)
class _Waiting:
    adapter: str
    upstreams: tuple[str, ...]


class Admission:
    """The places of all upstreams, and the queue.

    Every place, by `enter` or by `Admit`, ends with one `leave`. An admitted ticket's place
    is the ticket's until `taken` says that its request has heard of it; up to then
    `withdraw` gives the place back, so that a request which is cancelled does not have to
    know whether it was admitted in the same turn.

    Args:
        length: Tickets that may wait, in all.

    Raises:
        ValueError: If `length` is negative.
    """

    __slots__ = ("_active", "_admitted", "_depths", "_length", "_limits", "_lines", "_waiting")

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"no queue has a length of {length}")
        self._length = length
        self._limits: dict[str, int] = {}  # only those that have one
        self._active: dict[str, int] = {}  # places held, where there are any
        self._waiting: dict[Ticket, _Waiting] = {}
        self._admitted: dict[Ticket, str] = {}  # and not yet taken
        self._depths: dict[str, int] = {}  # adapter -> tickets that wait, where there are any
        # Upstream -> adapter, the next one first -> tickets, the oldest first. None is empty.
        self._lines: dict[str, dict[str, dict[Ticket, None]]] = {}

    # --- upstreams -----------------------------------------------------------------------

    def limit(self, upstream: str, most: int | None) -> list[Admit]:
        """Sets an upstream's limit of concurrent requests.

        Requests beyond a new, lower limit end in their own time.

        Args:
            upstream: Need not have been heard of.
            most: At least 1; None for no bound.

        Returns:
            Who gets a place by it.

        Raises:
            ValueError: If `most` is below 1.
        """
        if most is None:
            self._limits.pop(upstream, None)
        elif most < 1:
            raise ValueError(f"a limit must be at least 1, not {most}")
        else:
            self._limits[upstream] = most
        return self._hand_over(upstream)

    def remove(self, upstream: str) -> list[Ticket]:
        """An upstream has left the fleet. Its requests under way still end with `leave`.

        Returns:
            The tickets that waited for it alone, and wait no longer. The others go on
            waiting for the rest.
        """
        self._limits.pop(upstream, None)
        line = self._lines.get(upstream, {})
        waited = [ticket for tickets in line.values() for ticket in tickets]
        in_vain: list[Ticket] = []
        for ticket in waited:
            waiting = self._waiting[ticket]
            others = tuple(other for other in waiting.upstreams if other != upstream)
            if others:
                self._step_out(ticket, waiting.adapter, upstream)
                self._waiting[ticket] = _Waiting(waiting.adapter, others)
            else:
                self._dequeue(ticket)
                in_vain.append(ticket)
        return in_vain

    # --- places --------------------------------------------------------------------------

    def has_room(self, upstream: str) -> bool:
        """Whether `enter` would succeed. Then nobody waits for it either."""
        limit = self._limits.get(upstream)
        return limit is None or self._active.get(upstream, 0) < limit

    def enter(self, upstream: str) -> bool:
        """Takes a place, if there is one."""
        if not self.has_room(upstream):
            return False
        self._active[upstream] = self._active.get(upstream, 0) + 1
        return True

    def leave(self, upstream: str) -> list[Admit]:
        """A request has ended: its place is free.

        Returns:
            Who gets it.

        Raises:
            ValueError: If nobody holds a place there.
        """
        active = self._active.get(upstream, 0) - 1
        if active > 0:
            self._active[upstream] = active
        elif active == 0:
            del self._active[upstream]
        else:
            raise ValueError(f"nobody has a place on {upstream}")
        return self._hand_over(upstream) if self._waiting else []

    # --- the queue -----------------------------------------------------------------------

    def wait(self, ticket: Ticket, adapter: str, upstreams: Sequence[str]) -> bool:
        """Lets a ticket wait for the first place on any of some upstreams.

        Args:
            ticket: New, or done with since it was last used.
            adapter: Whose turn it uses.
            upstreams: At least one, and each at its limit: `enter` was tried.

        Returns:
            False if the queue is full.

        Raises:
            ValueError: If the ticket is in use, or has nothing to wait for.
        """
        if ticket in self._waiting or ticket in self._admitted:
            raise ValueError(f"ticket {ticket!r} is in use")
        if not upstreams or any(map(self.has_room, upstreams)):
            raise ValueError(f"ticket {ticket!r} has nothing to wait for")
        if len(self._waiting) >= self._length:
            return False
        self._waiting[ticket] = _Waiting(adapter, tuple(dict.fromkeys(upstreams)))
        self._depths[adapter] = self._depths.get(adapter, 0) + 1
        for upstream in upstreams:
            self._lines.setdefault(upstream, {}).setdefault(adapter, {})[ticket] = None
        return True

    def taken(self, ticket: Ticket) -> None:
        """An admitted ticket's request has its place, which ends with `leave` from now on."""
        del self._admitted[ticket]

    def withdraw(self, ticket: Ticket) -> list[Admit]:
        """A ticket's request waits no longer: timed out, or cancelled, perhaps as it was admitted.

        Any other ticket is no matter.

        Returns:
            Who gets its place, if it had one.
        """
        if ticket in self._waiting:
            self._dequeue(ticket)
        upstream = self._admitted.pop(ticket, None)
        return [] if upstream is None else self.leave(upstream)

    # --- readings ------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many tickets wait."""
        return len(self._waiting)

    def depth_of(self, adapter: str) -> int:
        """How many of them wait for this adapter's turn."""
        return self._depths.get(adapter, 0)

    # --- lines ---------------------------------------------------------------------------

    def _hand_over(self, upstream: str) -> list[Admit]:
        """Gives an upstream's free places to those in its line, in turn."""
        admitted = []
        while (line := self._lines.get(upstream)) and self.enter(upstream):
            adapter, tickets = next(iter(line.items()))
            ticket = next(iter(tickets))
            self._dequeue(ticket)
            if tickets:
                line[adapter] = line.pop(adapter)  # to the end
            self._admitted[ticket] = upstream
            admitted.append(Admit(ticket, upstream))
        return admitted

    def _dequeue(self, ticket: Ticket) -> None:
        """Takes a ticket out of all its lines."""
        waiting = self._waiting.pop(ticket)
        adapter = waiting.adapter
        self._depths[adapter] -= 1
        if not self._depths[adapter]:
            del self._depths[adapter]
        for upstream in waiting.upstreams:
            self._step_out(ticket, adapter, upstream)

    def _step_out(self, ticket: Ticket, adapter: str, upstream: str) -> None:
        """Takes a ticket out of one line."""
        line = self._lines[upstream]
        del line[adapter][ticket]
        if not line[adapter]:
            del line[adapter]
        if not line:
            del self._lines[upstream]
