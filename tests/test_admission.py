"""Places, limits, and the turns of those who wait."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_proxy.admission import Admission, Admit


def full(*upstreams: str, length: int = 100, most: int = 1) -> Admission:
    """These upstreams are at their limits, and nobody waits yet."""
    admission = Admission(length)
    for upstream in upstreams:
        assert admission.limit(upstream, most) == []
        for _ in range(most):
            assert admission.enter(upstream)
    return admission


# --- places --------------------------------------------------------------------------------


def test_without_limits_everybody_enters() -> None:
    admission = Admission(0)
    for _ in range(1000):
        assert admission.has_room("gpu-0")
        assert admission.enter("gpu-0")
    for _ in range(1000):
        assert admission.leave("gpu-0") == []


def test_nobody_enters_beyond_the_limit() -> None:
    admission = Admission(0)
    admission.limit("gpu-0", 2)
    assert [admission.enter("gpu-0") for _ in range(3)] == [True, True, False]
    assert not admission.has_room("gpu-0")
    assert admission.leave("gpu-0") == []
    assert admission.has_room("gpu-0")
    assert [admission.enter("gpu-0") for _ in range(2)] == [True, False]


def test_each_upstream_has_its_own_limit() -> None:
    admission = full("gpu-0")
    assert not admission.enter("gpu-0")
    assert admission.enter("gpu-1")


def test_requests_from_before_there_was_a_limit_count() -> None:
    admission = Admission(0)
    for _ in range(3):
        admission.enter("gpu-0")
    admission.limit("gpu-0", 2)
    assert not admission.enter("gpu-0")
    admission.leave("gpu-0")
    assert not admission.enter("gpu-0")
    admission.leave("gpu-0")
    assert admission.enter("gpu-0")


@pytest.mark.parametrize("most", [0, -1])
def test_a_limit_lets_somebody_in(most: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Admission(0).limit("gpu-0", most)


def test_a_queue_has_a_length() -> None:
    with pytest.raises(ValueError, match="no queue"):
        Admission(-1)


def test_who_has_no_place_cannot_leave_it() -> None:
    admission = full("gpu-0")
    admission.leave("gpu-0")
    with pytest.raises(ValueError, match="nobody has a place on gpu-0"):
        admission.leave("gpu-0")


# --- the queue -----------------------------------------------------------------------------


def test_a_place_that_becomes_free_goes_to_who_waits() -> None:
    admission = full("gpu-0")
    assert admission.wait(1, "sql", ["gpu-0"])
    assert admission.leave("gpu-0") == [Admit(1, "gpu-0")]
    assert not admission.enter("gpu-0")
    admission.taken(1)
    assert admission.leave("gpu-0") == []
    assert admission.enter("gpu-0")


def test_a_full_queue_takes_nobody_in() -> None:
    admission = full("gpu-0", length=2)
    assert [admission.wait(n, "sql", ["gpu-0"]) for n in range(3)] == [True, True, False]
    assert admission.depth == 2
    admission.leave("gpu-0")
    assert admission.wait(3, "sql", ["gpu-0"])


def test_without_a_queue_nobody_waits() -> None:
    assert not full("gpu-0", length=0).wait(1, "sql", ["gpu-0"])


def test_the_first_of_several_upstreams_is_taken_and_the_others_forgotten() -> None:
    admission = full("gpu-0", "gpu-1")
    assert admission.wait(1, "sql", ["gpu-0", "gpu-1", "gpu-0"])
    assert admission.leave("gpu-1") == [Admit(1, "gpu-1")]
    assert admission.depth == 0
    assert admission.leave("gpu-0") == []


def test_a_place_goes_only_to_who_can_use_it() -> None:
    admission = full("gpu-0", "gpu-1")
    admission.wait(1, "sql", ["gpu-0"])
    admission.wait(2, "chat", ["gpu-1"])
    assert admission.leave("gpu-1") == [Admit(2, "gpu-1")]
    assert admission.leave("gpu-0") == [Admit(1, "gpu-0")]


def test_adapters_take_turns_and_each_ones_tickets_go_in_order() -> None:
    admission = full("gpu-0")
    for ticket, adapter in enumerate(["sql", "sql", "sql", "chat", "chat", "code"]):
        admission.wait(ticket, adapter, ["gpu-0"])
    order = [admit.ticket for _ in range(6) for admit in admission.leave("gpu-0")]
    assert order == [0, 3, 5, 1, 4, 2]


def test_one_that_floods_starves_nobody() -> None:
    admission = full("gpu-0", length=1000)
    for ticket in range(500):
        admission.wait(ticket, "flood", ["gpu-0"])
    for ticket in range(10):  # and goes on flooding
        admission.leave("gpu-0")
        admission.wait(500 + ticket, "flood", ["gpu-0"])
    admission.wait("mine", "sql", ["gpu-0"])
    admits = admission.leave("gpu-0") + admission.leave("gpu-0")
    assert Admit("mine", "gpu-0") in admits


def test_coming_anew_gains_no_turn() -> None:
    admission = full("gpu-0")
    admission.wait(1, "quick", ["gpu-0"])
    admission.wait(2, "sql", ["gpu-0"])
    admission.wait(3, "chat", ["gpu-0"])
    assert admission.leave("gpu-0") == [Admit(1, "gpu-0")]
    admission.wait(4, "quick", ["gpu-0"])
    assert admission.leave("gpu-0") == [Admit(2, "gpu-0")]
    assert admission.leave("gpu-0") == [Admit(3, "gpu-0")]
    assert admission.leave("gpu-0") == [Admit(4, "gpu-0")]


def test_a_ticket_waits_for_something_and_once() -> None:
    admission = full("gpu-0")
    with pytest.raises(ValueError, match="nothing to wait for"):
        admission.wait(1, "sql", [])
    with pytest.raises(ValueError, match="nothing to wait for"):
        admission.wait(1, "sql", ["gpu-0", "gpu-1"])  # gpu-1 has room
    admission.wait(1, "sql", ["gpu-0"])
    with pytest.raises(ValueError, match="in use"):
        admission.wait(1, "sql", ["gpu-0"])
    admission.leave("gpu-0")
    with pytest.raises(ValueError, match="in use"):
        admission.wait(1, "sql", ["gpu-0"])


def test_the_depth_is_known_by_adapter() -> None:
    admission = full("gpu-0", "gpu-1")
    for ticket, adapter in enumerate(["sql", "sql", "chat"]):
        admission.wait(ticket, adapter, ["gpu-0", "gpu-1"])
    assert [admission.depth_of(name) for name in ("sql", "chat", "code")] == [2, 1, 0]
    admission.leave("gpu-1")
    assert [admission.depth, admission.depth_of("sql")] == [2, 1]


# --- withdrawing ---------------------------------------------------------------------------


def test_who_withdraws_is_passed_over() -> None:
    admission = full("gpu-0")
    admission.wait(1, "sql", ["gpu-0"])
    admission.wait(2, "sql", ["gpu-0"])
    assert admission.withdraw(1) == []
    assert admission.depth == 1
    assert admission.leave("gpu-0") == [Admit(2, "gpu-0")]


def test_who_withdraws_as_it_is_admitted_gives_its_place_to_the_next() -> None:
    admission = full("gpu-0")
    admission.wait(1, "sql", ["gpu-0"])
    admission.wait(2, "sql", ["gpu-0"])
    assert admission.leave("gpu-0") == [Admit(1, "gpu-0")]
    assert admission.withdraw(1) == [Admit(2, "gpu-0")]
    assert admission.withdraw(2) == []
    assert admission.enter("gpu-0")


def test_who_has_taken_its_place_gives_it_back_by_leaving_only() -> None:
    admission = full("gpu-0")
    admission.wait(1, "sql", ["gpu-0"])
    admission.leave("gpu-0")
    admission.taken(1)
    assert admission.withdraw(1) == []
    assert not admission.enter("gpu-0")


def test_withdrawing_what_never_waited_is_no_matter() -> None:
    admission = full("gpu-0", length=0)
    assert not admission.wait(1, "sql", ["gpu-0"])
    assert admission.withdraw(1) == []


# --- a changing fleet ------------------------------------------------------------------------


def test_a_higher_limit_admits_who_waits() -> None:
    admission = full("gpu-0")
    for ticket in range(4):
        admission.wait(ticket, "sql", ["gpu-0"])
    assert admission.limit("gpu-0", 3) == [Admit(0, "gpu-0"), Admit(1, "gpu-0")]
    assert admission.limit("gpu-0", None) == [Admit(2, "gpu-0"), Admit(3, "gpu-0")]


def test_a_lower_limit_waits_for_the_surplus_to_end() -> None:
    admission = full("gpu-0", most=3)
    admission.wait(1, "sql", ["gpu-0"])
    assert admission.limit("gpu-0", 1) == []
    assert [admission.leave("gpu-0") for _ in range(2)] == [[], []]
    assert admission.leave("gpu-0") == [Admit(1, "gpu-0")]


def test_who_waits_for_a_removed_upstream_alone_waits_in_vain() -> None:
    admission = full("gpu-0", "gpu-1")
    admission.wait(1, "sql", ["gpu-0"])
    admission.wait(2, "chat", ["gpu-0", "gpu-1"])
    assert admission.remove("gpu-0") == [1]
    assert (admission.depth, admission.depth_of("sql")) == (1, 0)
    assert admission.leave("gpu-0") == []
    assert admission.leave("gpu-1") == [Admit(2, "gpu-1")]


def test_a_removed_upstream_has_no_limit_any_more() -> None:
    admission = full("gpu-0")
    admission.remove("gpu-0")
    assert admission.enter("gpu-0")  # by a request that had chosen it before


def test_removing_what_is_not_known_is_no_matter() -> None:
    assert Admission(1).remove("gpu-0") == []


def test_requests_under_way_on_a_removed_upstream_count_when_it_returns() -> None:
    admission = full("gpu-0")
    admission.remove("gpu-0")
    admission.limit("gpu-0", 1)
    assert not admission.enter("gpu-0")
    admission.leave("gpu-0")
    assert admission.enter("gpu-0")


# --- whatever happens ------------------------------------------------------------------------

UPSTREAMS = ["gpu-0", "gpu-1", "gpu-2"]
ADAPTERS = ["flood", "sql", "chat"]
LENGTH = 6
PICK = st.integers(0, 99)


class Crowd(RuleBasedStateMachine):
    """Any order of events, checked against a plain account of who is where.

    Attributes:
        places: Requests that hold a place and have heard of it, by upstream.
        told: Ticket -> the upstream of its place, of which it has not heard yet.
        queue: Ticket -> adapter and upstreams, in order of arrival.
        turns: Ticket and upstream -> the turns that adapters had there while it waited.
    """

    @initialize(limits=st.lists(st.integers(1, 3), min_size=3, max_size=3))
    def start(self, limits: list[int]) -> None:
        self.admission = Admission(LENGTH)
        self.limits: dict[str, int | None] = dict(zip(UPSTREAMS, limits, strict=True))
        self.places: Counter[str] = Counter()
        self.told: dict[int, str] = {}
        self.queue: dict[int, tuple[str, list[str]]] = {}
        self.turns: dict[tuple[int, str], Counter[str]] = {}
        self.tickets = 0
        for upstream, most in self.limits.items():
            assert self.admission.limit(upstream, most) == []

    def active(self, upstream: str) -> int:
        return self.places[upstream] + list(self.told.values()).count(upstream)

    def room(self, upstream: str) -> bool:
        most = self.limits[upstream]
        return most is None or self.active(upstream) < most

    def admitted(self, admits: list[Admit]) -> None:
        for admit in admits:
            ticket, upstream = admit.ticket, admit.upstream
            assert isinstance(ticket, int)
            assert self.room(upstream)
            adapter, able = self.queue.pop(ticket)
            assert upstream in able
            for other, (name, upstreams) in self.queue.items():
                if upstream not in upstreams:
                    continue
                # First come, first served inside an adapter.
                assert name != adapter or other > ticket
                # Between adapters: no second turn while another one waits for its first.
                turns = self.turns[other, upstream]
                turns[adapter] += 1
                assert name == adapter or turns[adapter] <= 1 + turns[name]
            self.told[ticket] = upstream

    @rule(adapter=st.sampled_from(ADAPTERS), data=st.data())
    def comes(self, adapter: str, data: st.DataObject) -> None:
        choices = data.draw(st.permutations(UPSTREAMS))[: data.draw(st.integers(1, 3))]
        for upstream in choices:
            entered = self.room(upstream)
            assert self.admission.enter(upstream) == entered
            if entered:
                self.places[upstream] += 1
                return
        self.tickets += 1
        taken_in = self.admission.wait(self.tickets, adapter, choices)
        assert taken_in == (len(self.queue) < LENGTH)
        if taken_in:
            self.queue[self.tickets] = (adapter, list(choices))
            self.turns.update({(self.tickets, name): Counter() for name in choices})

    @precondition(lambda self: self.told)
    @rule(pick=PICK)
    def hears(self, pick: int) -> None:
        ticket = sorted(self.told)[pick % len(self.told)]
        self.admission.taken(ticket)
        self.places[self.told.pop(ticket)] += 1

    @precondition(lambda self: self.places.total())
    @rule(pick=PICK)
    def ends(self, pick: int) -> None:
        upstream = sorted(self.places.elements())[pick % self.places.total()]
        self.places[upstream] -= 1
        self.admitted(self.admission.leave(upstream))

    @precondition(lambda self: self.queue or self.told)
    @rule(pick=PICK)
    def withdraws(self, pick: int) -> None:
        tickets = sorted({*self.queue, *self.told})
        ticket = tickets[pick % len(tickets)]
        self.queue.pop(ticket, None)
        self.told.pop(ticket, None)
        self.admitted(self.admission.withdraw(ticket))

    @rule(upstream=st.sampled_from(UPSTREAMS), most=st.none() | st.integers(1, 4))
    def is_limited(self, upstream: str, most: int | None) -> None:
        self.limits[upstream] = most
        self.admitted(self.admission.limit(upstream, most))

    @rule(upstream=st.sampled_from(UPSTREAMS), most=st.integers(1, 3))
    def is_removed_and_returns(self, upstream: str, most: int) -> None:
        refused = self.admission.remove(upstream)
        for _, upstreams in self.queue.values():
            if upstream in upstreams:
                upstreams.remove(upstream)
        alone = {ticket for ticket, (_, upstreams) in self.queue.items() if not upstreams}
        assert set(refused) == alone
        for ticket in alone:
            del self.queue[ticket]
        self.is_limited(upstream, most)

    @invariant()
    def readings_agree(self) -> None:
        assert self.admission.depth == len(self.queue)
        depths = Counter(adapter for adapter, _ in self.queue.values())
        for adapter in ADAPTERS:
            assert self.admission.depth_of(adapter) == depths[adapter]
        for upstream in UPSTREAMS:
            assert self.admission.has_room(upstream) == self.room(upstream)

    @invariant()
    def nobody_waits_for_a_free_place(self) -> None:
        assert not any(self.room(name) for _, names in self.queue.values() for name in names)

    def teardown(self) -> None:
        """When everybody has gone, nothing is left."""
        if not hasattr(self, "admission"):
            return
        while self.queue or self.told or self.places.total():
            while self.told:
                self.hears(0)
            if self.places.total():
                self.ends(0)
        admission = self.admission
        left = (admission._active, admission._waiting, admission._admitted)
        assert not any((*left, admission._depths, admission._lines))


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(deadline=None, stateful_step_count=60)
