"""The simulation of a large fleet, on a small one: it runs, and what it says holds together."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))  # as if it had been started there

from simulate import BEGIN, END, markdown, replaced, terminal  # noqa: E402  # the path comes first
from virtual import Tally, VirtualFleet  # noqa: E402  # likewise
from workload import (  # noqa: E402  # likewise
    CROWD,
    REPORTED,
    RESTARTS,
    STEADY,
    WARM_UP,
    Scenario,
    phases,
    requests,
    shared_cache,
)

from lora_proxy.routing import POLICIES, Spill  # noqa: E402  # likewise

SMALL = Scenario(
    upstreams=6,
    slots=16,
    adapters=400,
    crowd_rank=60,
    crowd_time=30.0,
    calm=5.0,
    downtime=20.0,
    down_at_once=1,
    requests=8_000,
)


@functools.cache
def played(policy: str) -> dict[str, Tally]:
    return VirtualFleet(SMALL, POLICIES[policy], Spill()).run()


def test_phases_follow_one_another_and_last_for_all_requests() -> None:
    plan = phases(SMALL)
    assert plan[0].start == 0
    for one, following in itertools.pairwise(plan):
        assert one.start < one.end == following.start
    assert plan[-1].end == pytest.approx(SMALL.requests / SMALL.rate)


def test_too_few_requests_are_refused_with_a_number_that_is_enough() -> None:
    with pytest.raises(ValueError, match=r"take \d+ or more"):
        phases(Scenario(requests=1000))


def test_a_seed_makes_the_same_requests_and_another_seed_makes_others() -> None:
    first = list(requests(SMALL))
    assert list(requests(SMALL)) == first
    assert len(first) == SMALL.requests
    assert list(requests(Scenario(requests=200_000, seed=2)))[:10] != first[:10]


def test_the_crowd_comes_when_it_should() -> None:
    crowd = next(phase for phase in phases(SMALL) if phase.name == CROWD)
    for request_is_in, share in ((True, SMALL.crowd_share), (False, 0.0)):
        asked = [r for r in requests(SMALL) if (crowd.start <= r.at < crowd.end) == request_is_in]
        hot = sum(r.adapter == "a-60" for r in asked) / len(asked)
        assert hot == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_once_and_hardly_one_fails(policy: str) -> None:
    tallies = played(policy)
    assert sum(tally.requests for tally in tallies.values()) == SMALL.requests
    for tally in tallies.values():
        assert len(tally.waits) + tally.failed == tally.requests
    # A server that stops fails whoever waits for a load there, in one moment; under round-robin
    # these can be more than the retry budget has kept.
    spared = RESTARTS if policy == "round-robin" else None
    assert [phase for phase, tally in tallies.items() if tally.failed and phase != spared] == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wait_is_never_negative_and_the_fleet_is_loaded_once_at_least(policy: str) -> None:
    tallies = played(policy)
    assert all(min(tally.waits) >= 0 for tally in tallies.values())
    assert tallies[WARM_UP].loads >= SMALL.upstreams * SMALL.slots
    assert all(tally.imbalance >= 1 for tally in tallies.values())


def test_only_restarts_are_noticed_by_a_retry() -> None:
    tallies = played("least-loaded")
    assert tallies[STEADY].retries == tallies[CROWD].retries == 0
    assert tallies[RESTARTS].retries > 0


@pytest.mark.parametrize("phase", REPORTED)
@pytest.mark.parametrize("affinity", ["lora-affinity", "prefix-affinity"])
def test_affinity_needs_fewer_loads_and_shorter_waits(affinity: str, phase: str) -> None:
    ours = played(affinity)[phase]
    for other in ("round-robin", "least-loaded"):
        theirs = played(other)[phase]
        assert ours.loads < 0.75 * theirs.loads
        assert sum(ours.waits) < sum(theirs.waits)


def test_no_policy_does_better_than_one_cache_of_all_slots() -> None:
    ideal = shared_cache(SMALL)[STEADY]
    for policy in POLICIES:
        tally = played(policy)[STEADY]
        assert tally.per_thousand(tally.loads) > 0.9 * ideal  # LRU is not the best there can be


def test_a_conversation_comes_back_more_often_with_prefix_affinity() -> None:
    assert played("prefix-affinity")[STEADY].came_back > played("lora-affinity")[STEADY].came_back


def test_the_same_seed_gives_the_same_numbers() -> None:
    again = VirtualFleet(SMALL, POLICIES["lora-affinity"], Spill()).run()
    assert again == played("lora-affinity")


def test_the_report_fits_a_terminal_and_the_page() -> None:
    results = {policy: played(policy) for policy in POLICIES}
    lines = list(terminal(SMALL, Spill(), results, shared_cache(SMALL)))
    assert max(map(len, lines)) <= 80
    table = "\n".join(markdown(SMALL, Spill(), results, shared_cache(SMALL)))
    assert table.count("| lora-affinity |") == len(REPORTED)
    page = (BENCH / "SIMULATION.md").read_text("utf-8")
    changed = replaced(page, table)
    assert table in changed
    assert replaced(changed, table) == changed
    assert changed.partition(BEGIN)[0] == page.partition(BEGIN)[0]
    assert changed.partition(END)[2] == page.partition(END)[2]


def test_a_page_without_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="no <!--"):
        replaced("a page", "a table")


def test_the_command_says_what_is_too_little() -> None:
    command = [sys.executable, str(BENCH / "simulate.py"), "--requests", "10"]
    # PYTHONSAFEPATH would keep the script's own folder off the path.
    done = subprocess.run(command, capture_output=True, text=True, env={}, check=False)
    assert done.returncode == 2
    assert "take 177" in done.stderr
