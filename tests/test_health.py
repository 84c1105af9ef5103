"""When an upstream may be used, as probes, requests and it itself tell."""

from copy import copy
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_proxy.health import HOLD_MOST, LEAST_SHARE, Circuit, Health, Thresholds


def closed(**thresholds: float) -> Health:
    """An upstream that is up, as it was from the beginning."""
    return Health(Thresholds(**thresholds), up=True)  # type: ignore[arg-type]  # some are int


def opened(now: float = 0.0, **thresholds: float) -> Health:
    """The circuit of this one opened at `now`."""
    health = closed(**thresholds)
    while not failed(health, now):
        pass
    assert health.circuit is Circuit.OPEN
    return health


def failed(health: Health, now: float) -> bool:
    """One more request fails."""
    return health.failed(now, trial=health.begin())


def succeeded(health: Health, now: float) -> None:
    """One more request succeeds."""
    health.succeeded(now, trial=health.begin())


# --- probes --------------------------------------------------------------------------------


def test_a_run_of_failures_takes_it_down_and_a_run_of_successes_brings_it_up() -> None:
    health = closed(fall=3, rise=2)
    assert [health.probe_failed() for _ in range(4)] == [False, False, True, False]
    assert not health.up
    assert not health.usable(4)
    assert [health.probe_ok(now) for now in (5, 6, 7)] == [False, True, False]
    assert health.usable(7)


def test_one_success_ends_a_run_of_failures() -> None:
    health = closed(fall=2)
    assert not health.probe_failed()
    assert not health.probe_ok(1)
    assert not health.probe_failed()
    assert health.probe_failed()


def test_one_failure_ends_a_run_of_successes() -> None:
    health = Health(Thresholds(rise=2), up=False)
    assert not health.probe_ok(1)
    assert not health.probe_failed()
    assert not health.probe_ok(2)
    assert health.probe_ok(3)


def test_a_threshold_of_one_believes_at_once() -> None:
    health = closed(fall=1, rise=1)
    assert health.probe_failed()
    assert health.probe_ok(1)


def test_a_new_upstream_is_not_usable_before_its_first_probe() -> None:
    health = Health(Thresholds(), up=False)
    assert not health.usable(0)
    assert health.probe_ok(1)
    assert health.usable(1)


def test_requests_change_nothing_about_the_probes_verdict() -> None:
    health = Health(Thresholds(fall=1), up=False)
    succeeded(health, 1)
    assert not health.up
    health.probe_ok(2)
    failed(health, 3)
    assert health.up


def test_the_next_probe_comes_sooner_after_one_failure_and_later_after_many() -> None:
    health = closed(fall=3)
    assert health.next_probe(10, 1.1) == pytest.approx(11)
    waits = []
    for _ in range(8):
        health.probe_failed()
        waits.append(health.next_probe(10, 1.0))
    assert waits == [2.5, 5, 10, 20, 40, 80, 80, 80]
    for _ in range(2000):
        health.probe_failed()
    assert health.next_probe(10, 0.5) == 40


def test_one_that_comes_back_is_looked_at_soon_until_it_is_up() -> None:
    health = Health(Thresholds(rise=3), up=False)
    waits = []
    for now in range(4):
        health.probe_ok(now)
        waits.append(health.next_probe(8, 1.0))
    assert waits == [2, 2, 8, 8]


# --- the circuit ----------------------------------------------------------------------------


def test_a_run_of_failed_requests_opens_the_circuit_and_time_half_opens_it() -> None:
    health = closed(fall=3, pause=5)
    assert [failed(health, now) for now in (1, 2, 3)] == [False, False, True]
    assert not health.usable(7.9)
    assert health.circuit is Circuit.OPEN
    assert health.usable(8)
    assert health.circuit is Circuit.HALF_OPEN


def test_one_success_ends_a_run_of_failed_requests() -> None:
    health = closed(fall=2)
    assert not failed(health, 1)
    succeeded(health, 2)
    assert not failed(health, 3)
    assert failed(health, 4)


def test_jitter_stretches_the_pause() -> None:
    health = closed(fall=1, pause=10)
    assert health.failed(100, 1.2, trial=health.begin())
    assert not health.usable(111.9)
    assert health.usable(112)


def test_a_half_open_circuit_lets_a_few_through_and_their_success_closes_it() -> None:
    health = opened(0, pause=5, trials=2)
    assert health.usable(5)
    assert health.begin()
    assert health.usable(5)
    assert health.begin()
    assert not health.usable(6)
    health.succeeded(7, trial=True)
    assert (health.usable(7), health.circuit) == (True, Circuit.HALF_OPEN)
    health.succeeded(8, trial=True)
    assert (health.usable(8), health.circuit) == (True, Circuit.CLOSED)


def test_who_begins_without_asking_makes_no_trial_too_many() -> None:
    health = opened(0, pause=5, trials=1)
    assert health.usable(5)
    assert [health.begin(), health.begin()] == [True, False]


def test_a_failed_trial_opens_it_again_for_twice_as_long_up_to_a_bound() -> None:
    health, now = opened(0, pause=5, pause_most=18), 0.0
    for pause in (5, 10, 18, 18):
        assert not health.usable(now + pause - 0.1)
        now += pause
        assert health.usable(now)
        assert failed(health, now)


def test_once_closed_it_opens_for_the_first_pause_again() -> None:
    health = opened(0, fall=2, pause=5, trials=1)
    assert health.usable(5)
    assert failed(health, 5)
    assert health.usable(15)
    succeeded(health, 15)
    assert [failed(health, 20), failed(health, 20)] == [False, True]
    assert not health.usable(24.9)
    assert health.usable(25)


def test_what_was_sent_before_it_opened_is_no_trial() -> None:
    health = closed(fall=1, pause=5, trials=2)
    old = [health.begin() for _ in range(6)]
    assert health.failed(0, trial=old.pop())
    assert not health.failed(1, trial=old.pop())  # does not prolong the pause
    assert health.usable(5)
    health.succeeded(6, trial=old.pop())
    health.succeeded(6, trial=old.pop())
    assert not health.failed(6, trial=old.pop())
    assert health.circuit is Circuit.HALF_OPEN
    assert [health.begin(), health.begin()] == [True, True]
    health.cancelled(trial=old.pop())
    assert not health.usable(6)


def test_a_trial_whose_client_left_makes_room_for_another() -> None:
    health = opened(0, pause=5, trials=1)
    assert health.usable(5)
    trial = health.begin()
    assert not health.usable(6)
    health.cancelled(trial=trial)
    assert (health.usable(6), health.circuit) == (True, Circuit.HALF_OPEN)


def test_a_trial_that_outlives_its_half_open_circuit_still_takes_its_place() -> None:
    health = opened(0, pause=5, trials=2)
    assert health.usable(5)
    slow, quick = health.begin(), health.begin()
    assert health.failed(6, trial=quick)
    assert health.usable(16)
    assert health.begin()
    assert not health.usable(17)
    health.cancelled(trial=slow)
    assert health.usable(17)


def test_successful_trials_count_in_a_row() -> None:
    health = opened(0, pause=5, trials=2)
    assert health.usable(5)
    succeeded(health, 5)
    assert failed(health, 6)
    assert health.usable(16)
    succeeded(health, 16)
    assert health.circuit is Circuit.HALF_OPEN


def test_a_trial_that_ends_after_it_closed_is_a_request_like_others() -> None:
    health = opened(0, fall=2, pause=5, trials=2)
    assert health.usable(5)
    first, second = health.begin(), health.begin()
    health.succeeded(6, trial=first)
    third = health.begin()
    health.succeeded(7, trial=second)
    assert not health.failed(8, trial=third)
    assert health.circuit is Circuit.CLOSED
    assert health.failed(9, trial=False)  # broke after its head: the second in a row


def test_probes_that_bring_it_back_half_open_the_circuit_at_once() -> None:
    health = opened(0, fall=1, pause=50, pause_most=60, trials=1)
    assert health.usable(50)
    assert failed(health, 50)
    assert health.probe_failed()
    assert health.probe_ok(60)
    assert (health.usable(60), health.circuit) == (True, Circuit.HALF_OPEN)
    assert failed(health, 60)
    assert not health.usable(119)
    assert health.usable(120)


def test_probes_that_merely_go_on_succeeding_do_not_close_a_circuit() -> None:
    health = opened(0, pause=5)
    assert not health.probe_ok(1)
    assert not health.usable(1)


def test_probes_that_bring_it_back_end_a_run_of_failed_requests() -> None:
    health = closed(fall=2, rise=1)
    assert not failed(health, 0)
    assert [health.probe_failed(), health.probe_failed()] == [False, True]
    assert health.probe_ok(1)
    assert not failed(health, 2)
    assert health.circuit is Circuit.CLOSED


# --- its own wish ---------------------------------------------------------------------------


def test_it_is_left_alone_for_as_long_as_it_asks_and_no_circuit_opens() -> None:
    health = closed()
    health.unavailable_until(100, 7)
    assert not health.usable(106.9)
    assert (health.usable(107), health.circuit) == (True, Circuit.CLOSED)


def test_it_cannot_ask_for_more_than_a_minute() -> None:
    health = closed()
    health.unavailable_until(100, inf)
    assert not health.usable(100 + HOLD_MOST - 0.1)
    assert health.usable(100 + HOLD_MOST)


def test_a_shorter_wish_does_not_shorten_a_longer_one() -> None:
    health = closed()
    health.unavailable_until(0, 30)
    health.unavailable_until(1, 2)
    assert not health.usable(29)
    assert health.usable(30)


def test_a_restart_ends_what_it_asked_for() -> None:
    health = closed(fall=1)
    health.unavailable_until(0, 30)
    health.probe_failed()
    health.probe_ok(2)
    assert health.usable(2)


# --- readings -------------------------------------------------------------------------------


def test_how_long_to_wait_for_it() -> None:
    health = opened(0, fall=1, pause=5)
    assert health.wait(1) == 4
    health.unavailable_until(1, 20)
    assert health.wait(1) == 20
    assert health.wait(50) == 0
    health.probe_failed()
    assert health.wait(50) is None
    assert closed().wait(0) == 0


def test_one_that_never_left_has_its_whole_share() -> None:
    assert closed().share(0) == 1


@pytest.mark.parametrize("way", ["probes", "trials"])
def test_the_share_of_one_that_returns_grows(way: str) -> None:
    if way == "probes":
        health = Health(Thresholds(ramp=10), up=False)
        health.probe_ok(100)
    else:
        health = opened(0, trials=1, ramp=10)
        assert health.usable(100)
        succeeded(health, 100)
    shares = [health.share(now) for now in (100, 105, 109.9, 110, 1000)]
    assert shares == pytest.approx([LEAST_SHARE, 0.55, 0.991, 1, 1])


def test_no_ramp_no_slow_start() -> None:
    health = Health(Thresholds(ramp=0), up=False)
    health.probe_ok(100)
    assert health.share(100) == 1


# --- whatever happens -----------------------------------------------------------------------


class Schedule(RuleBasedStateMachine):
    """Any order of probes, requests and waits, with the requests kept count of here."""

    def __init__(self) -> None:
        super().__init__()
        self.thresholds = Thresholds(
            fall=2, rise=2, pause=5.0, pause_most=30.0, trials=2, ramp=10.0
        )
        self.health = Health(self.thresholds, up=True)
        self.now = 0.0
        self.under_way: list[bool] = []  # of each request, whether it is a trial

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 5.0, 29.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(ok=st.booleans())
    def probe(self, ok: bool) -> None:  # noqa: FBT001  # hypothesis passes keywords
        up = self.health.up
        changed = self.health.probe_ok(self.now) if ok else self.health.probe_failed()
        assert changed == (self.health.up != up)

    @rule()
    def request(self) -> None:
        if self.health.usable(self.now):
            trial = self.health.begin()
            assert trial == (self.health.circuit is Circuit.HALF_OPEN)
            self.under_way.append(trial)

    @rule()
    def request_in_spite_of_all(self) -> None:
        self.under_way.append(self.health.begin())

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def request_ends(self, data: st.DataObject, outcome: str) -> None:
        trial = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        before = self.health.circuit
        if outcome == "succeeded":
            self.health.succeeded(self.now, trial=trial)
        elif outcome == "failed":
            opened = self.health.failed(self.now, trial=trial)
            assert opened == (before is not Circuit.OPEN and self.health.circuit is Circuit.OPEN)
        else:
            self.health.cancelled(trial=trial)
            assert self.health.circuit is before
        if not trial and before is not Circuit.CLOSED:
            assert self.health.circuit is before

    @rule(seconds=st.integers(0, 1000))
    def asks_to_be_left_alone(self, seconds: int) -> None:
        self.health.unavailable_until(self.now, seconds)
        assert self.health.usable(self.now) <= (seconds == 0)

    @invariant()
    def trials_are_bounded(self) -> None:
        assert self.health._trials == sum(self.under_way) <= self.thresholds.trials

    @invariant()
    def readings_agree(self) -> None:
        assert LEAST_SHARE <= self.health.share(self.now) <= 1
        wait = self.health.wait(self.now)
        assert (wait is None) == (not self.health.up)
        if self.health.usable(self.now):
            assert wait == 0
        elif wait:
            later = copy(self.health)  # to ask is to half-open
            assert later.usable(self.now + wait) or sum(self.under_way) == self.thresholds.trials

    def teardown(self) -> None:
        """However it got there, time, an end to every request and good answers heal it."""
        for trial in self.under_way:
            self.health.cancelled(trial=trial)
        for _ in range(self.thresholds.rise):
            self.health.probe_ok(self.now)
        self.now += max(self.thresholds.pause_most, HOLD_MOST)
        for _ in range(self.thresholds.trials):
            assert self.health.usable(self.now)
            succeeded(self.health, self.now)
        assert self.health.circuit is Circuit.CLOSED
        assert self.health.share(self.now + self.thresholds.ramp) == 1


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(deadline=None, stateful_step_count=40)
