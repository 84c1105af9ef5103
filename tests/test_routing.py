"""The order of candidates, and when an upstream counts as down."""

from collections import Counter
from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_proxy.routing import Candidate, Health, Ranked, Tier, rank

IDLE = Candidate("gpu-0", up=True, resident=False, loading=False, free=True, load=0)


def names(ranked: list[Ranked]) -> list[str]:
    return [place.name for place in ranked]


# -- rank ---------------------------------------------------------------------------------


def test_the_fewer_steps_to_the_first_token_the_better_whatever_the_load() -> None:
    candidates = [
        replace(IDLE, name="full", free=False, load=0),
        replace(IDLE, name="free", load=1),
        replace(IDLE, name="loading", loading=True, load=2),
        replace(IDLE, name="resident", resident=True, free=False, load=3),
    ]
    expected = [
        Ranked("resident", Tier.RESIDENT),
        Ranked("loading", Tier.LOADING),
        Ranked("free", Tier.FREE),
        Ranked("full", Tier.FULL),
    ]
    for shuffled in permutations(candidates):
        assert rank("sql", shuffled) == expected


def test_inside_a_tier_the_least_loaded_is_first() -> None:
    loads = {"gpu-0": 7, "gpu-1": 0, "gpu-2": 3}
    candidates = [replace(IDLE, name=name, load=load) for name, load in loads.items()]
    assert names(rank("sql", candidates)) == ["gpu-1", "gpu-2", "gpu-0"]


def test_a_base_model_goes_to_the_least_loaded_and_needs_no_slot() -> None:
    candidates = [
        replace(IDLE, name="gpu-0", resident=True, load=2),
        replace(IDLE, name="gpu-1", free=False, load=1),
        replace(IDLE, name="gpu-2", loading=True, load=3),
    ]
    assert rank(None, candidates) == [
        Ranked("gpu-1", Tier.RESIDENT),
        Ranked("gpu-0", Tier.RESIDENT),
        Ranked("gpu-2", Tier.RESIDENT),
    ]


def test_what_is_down_is_tried_last_and_in_the_same_order() -> None:
    candidates = [
        replace(IDLE, name="down-resident", up=False, resident=True),
        replace(IDLE, name="down-free", up=False),
        replace(IDLE, name="up-full", free=False, load=99),
    ]
    assert names(rank("sql", candidates)) == ["up-full", "down-resident", "down-free"]
    assert names(rank("sql", candidates[:2])) == ["down-resident", "down-free"]


def test_no_candidates_no_order() -> None:
    assert rank("sql", []) == []
    assert rank(None, []) == []


def test_ties_are_broken_alike_in_every_process() -> None:
    """Written-out orders: they change only if placement changes for every deployment."""
    candidates = [replace(IDLE, name=f"gpu-{n}") for n in range(4)]
    assert names(rank("sql", candidates)) == ["gpu-1", "gpu-0", "gpu-2", "gpu-3"]
    assert names(rank("chat", candidates)) == ["gpu-2", "gpu-1", "gpu-3", "gpu-0"]


def test_adapters_spread_over_equal_upstreams() -> None:
    candidates = [replace(IDLE, name=f"gpu-{n}") for n in range(4)]
    firsts = Counter(rank(f"adapter-{n}", candidates)[0].name for n in range(1000))
    assert len(firsts) == 4
    assert min(firsts.values()) > 200


def test_an_upstream_that_leaves_moves_only_its_own_adapters() -> None:
    candidates = [replace(IDLE, name=f"gpu-{n}") for n in range(5)]
    for n in range(200):
        before = names(rank(f"adapter-{n}", candidates))
        after = names(rank(f"adapter-{n}", candidates[:-1]))
        assert after == [name for name in before if name != "gpu-4"]


@given(
    adapter=st.none() | st.text(),
    candidates=st.lists(
        st.builds(
            Candidate,
            name=st.text("abc", min_size=1, max_size=3),
            up=st.booleans(),
            resident=st.booleans(),
            loading=st.booleans(),
            free=st.booleans(),
            load=st.integers(0, 3),
        ),
        unique_by=lambda candidate: candidate.name,
    ),
    shuffle=st.randoms(use_true_random=False),
)
def test_every_candidate_has_one_place_whatever_order_they_come_in(
    adapter: str | None, candidates: list[Candidate], shuffle: Random
) -> None:
    order = rank(adapter, candidates)
    assert sorted(names(order)) == sorted(candidate.name for candidate in candidates)
    shuffled = list(candidates)
    shuffle.shuffle(shuffled)
    assert rank(adapter, shuffled) == order


@pytest.mark.parametrize("tier", Tier)
def test_a_tiers_label_is_fit_for_a_metric(tier: Tier) -> None:
    assert tier.label in {"resident", "loading", "free", "full"}


# -- health -------------------------------------------------------------------------------


def test_a_run_of_failures_takes_it_down_and_a_run_of_successes_brings_it_up() -> None:
    health = Health(fall=3, rise=2)
    health = health.failed(1).failed(2)
    assert health.up
    health = health.failed(3)
    assert (health.up, health.since) == (False, 3)
    health = health.ok(4)
    assert not health.up
    health = health.ok(5)
    assert (health.up, health.since) == (True, 5)


def test_one_success_ends_a_run_of_failures() -> None:
    health = Health(fall=2).failed(1).ok(2).failed(3)
    assert health.up
    assert not health.failed(4).up


def test_one_failure_ends_a_run_of_successes() -> None:
    health = Health(rise=2, up=False).ok(1).failed(2).ok(3)
    assert not health.up
    assert health.ok(4).up


def test_what_changes_nothing_returns_the_same_value() -> None:
    up, down = Health(), Health(up=False)
    assert up.ok(1) is up
    assert down.failed(1) is down


def test_a_threshold_of_one_believes_at_once() -> None:
    health = Health(fall=1, rise=1)
    assert not health.failed(1).up
    assert health.failed(1).ok(2) == replace(health, since=2)
