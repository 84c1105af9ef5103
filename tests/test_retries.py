"""The budget of retries, and what Retry-After says."""

from email.utils import format_datetime, parsedate_to_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_proxy.retries import MOST, Budget, retry_after

# --- the budget ----------------------------------------------------------------------------


def test_a_reserve_is_there_from_the_beginning_and_is_used_up() -> None:
    budget = Budget(share=0.2, reserve=3)
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]


def test_first_tries_earn_retries() -> None:
    budget = Budget(share=0.25, reserve=1)
    assert budget.spend()
    granted = []
    for _ in range(12):
        budget.deposit()
        granted.append(budget.spend())
    assert granted == [False, False, False, True] * 3


@pytest.mark.parametrize(("burst", "kept"), [(0, 2), (10, 5), (100, 50)])
def test_a_long_quiet_time_saves_what_a_burst_earns_and_no_less_than_the_reserve(
    burst: int, kept: int
) -> None:
    budget = Budget(share=0.5, reserve=2, burst=burst)
    for _ in range(1000):
        budget.deposit()
    assert [budget.spend() for _ in range(kept + 1)] == [True] * kept + [False]


def test_no_share_no_retries() -> None:
    budget = Budget(share=0)
    budget.deposit()
    assert not budget.spend()


@pytest.mark.parametrize(("share", "reserve"), [(-0.1, 10), (0.2, 0.9)])
def test_a_budget_that_could_never_work_is_refused(share: float, reserve: float) -> None:
    with pytest.raises(ValueError, match="no budget has"):
        Budget(share, reserve)


@given(
    share=st.floats(0, 1),
    reserve=st.floats(1, 20),
    first_tries=st.lists(st.booleans(), max_size=200),
)
def test_retries_never_exceed_their_share_and_the_reserve(
    share: float, reserve: float, first_tries: list[bool]
) -> None:
    budget, tries, retries = Budget(share, reserve), 0, 0
    for first in first_tries:
        if first:
            budget.deposit()
            tries += 1
        else:
            retries += budget.spend()
        assert retries <= share * tries + (reserve if share else 0) + 1e-6


@given(share=st.floats(0.01, 1), tries=st.integers(0, 300))
def test_everybody_failing_all_the_time_adds_the_share(share: float, tries: int) -> None:
    budget, retries = Budget(share, reserve=2), 0
    for _ in range(tries):
        budget.deposit()
        while budget.spend():
            retries += 1
    assert retries == pytest.approx(share * tries, abs=3.01)


# --- Retry-After -----------------------------------------------------------------------------

NOW = b"Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0", 0),
        (b"7", 7),
        (b"007", 7),
        (b" 7\t", 7),
        (b"59", 59),
        (b"3600", MOST),
        (b"9" * 10_000, MOST),
        (b"0" * 10_000 + b"7", 7),
        (b"Sun, 06 Nov 1994 08:49:47 GMT", 10),
        (b"Sunday, 06-Nov-94 08:49:47 GMT", 10),
        (b"Sun Nov  6 08:49:47 1994", 10),
        (b"Sun, 06 Nov 1994 10:49:47 +0200", 10),
        (b"Sun, 06 Nov 1994 09:49:37 GMT", MOST),
        (b"Sun, 06 Nov 1994 08:49:37 GMT", 0),
        (b"Sun, 06 Nov 1994 08:00:00 GMT", 0),
    ],
)
def test_what_an_answer_asks_for(value: bytes, seconds: float) -> None:
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    ("value", "date"),
    [
        (None, NOW),
        (b"", NOW),
        (b"soon", NOW),
        (b"-1", NOW),
        (b"1.5", NOW),
        (b"1 2", NOW),
        ("٣".encode(), NOW),
        (b"\xff", NOW),
        (b"Sun, 06 Xxx 1994 08:49:37 GMT", NOW),
        (b"Sun, 06 Nov 99999 08:49:37 GMT", NOW),
        (b"Sun, 06 Nov " + b"9" * 50 + b" 08:49:37 GMT", NOW),
        (NOW, None),
        (NOW, b""),
        (NOW, b"today"),
    ],
)
def test_what_says_nothing(value: bytes | None, date: bytes | None) -> None:
    assert retry_after(value, date) is None


def test_seconds_need_no_date() -> None:
    assert retry_after(b"7") == 7


@given(later=st.integers(-100, 100))
def test_a_date_is_worth_its_distance(later: int) -> None:
    now = parsedate_to_datetime(NOW.decode())
    until = format_datetime(now.fromtimestamp(now.timestamp() + later, now.tzinfo), usegmt=True)
    assert retry_after(until.encode(), NOW) == min(max(later, 0), MOST)


@given(
    value=st.binary() | st.text("0123456789 :,-+GMTSunNov").map(str.encode),
    date=st.none() | st.binary() | st.text("0123456789 :,-+GMTSunNov").map(str.encode),
)
def test_nothing_that_an_upstream_sends_breaks_it(value: bytes, date: bytes | None) -> None:
    seconds = retry_after(value, date)
    assert seconds is None or 0 <= seconds <= MOST
