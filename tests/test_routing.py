"""The order of candidates under each policy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_proxy.routing import (
    POLICIES,
    Ask,
    Candidate,
    Policy,
    Ranked,
    Spill,
    Tier,
    least_loaded,
    lora_affinity,
    prefix_affinity,
    round_robin,
)

SQL = Ask("sql")
BASE = Ask(None)
FULL = Candidate(
    "gpu-0",
    usable=True,
    resident=False,
    busy=False,
    loading=False,
    free=False,
    evictable=False,
    load=0,
)
EVICTABLE = replace(FULL, evictable=True)
FREE = replace(EVICTABLE, free=True)
LOADING = replace(FULL, loading=True)
RESIDENT = replace(FULL, resident=True)
BUSY = replace(RESIDENT, busy=True)

SPILL = Spill()
NEVER = Spill(floor=1_000_000)
"""For what is not about the bound."""


def names(ranked: Sequence[Ranked]) -> list[str]:
    return [place.name for place in ranked]


def fleet(*loads: int, of: Candidate = FREE) -> list[Candidate]:
    """gpu-0, gpu-1, … with these loads, alike in all else."""
    return [replace(of, name=f"gpu-{n}", load=load) for n, load in enumerate(loads)]


# --- lora-affinity: the tiers ------------------------------------------------------------


def test_the_fewer_steps_to_the_first_token_the_better_whatever_the_load() -> None:
    candidates = [
        replace(FULL, name="full", load=0),
        replace(EVICTABLE, name="evictable", load=1),
        replace(FREE, name="free", load=2),
        replace(LOADING, name="loading", load=3),
        replace(RESIDENT, name="resident", load=4),
        replace(BUSY, name="busy", load=5),
    ]
    expected = [
        Ranked("busy", Tier.BUSY),
        Ranked("resident", Tier.RESIDENT),
        Ranked("loading", Tier.LOADING),
        Ranked("free", Tier.FREE),
        Ranked("evictable", Tier.EVICTABLE),
        Ranked("full", Tier.FULL),
    ]
    for shuffled in permutations(candidates):
        assert lora_affinity(SQL, shuffled, SPILL) == expected


@pytest.mark.parametrize(
    ("candidate", "tier"),
    [
        (BUSY, Tier.BUSY),
        (replace(BUSY, free=True, evictable=True), Tier.BUSY),
        (replace(RESIDENT, free=True), Tier.RESIDENT),
        (replace(LOADING, free=True), Tier.LOADING),
        (FREE, Tier.FREE),
        (replace(FREE, evictable=False), Tier.FREE),
        (EVICTABLE, Tier.EVICTABLE),
        (FULL, Tier.FULL),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_says_what_a_candidate_has_of_the_adapter(
    policy: str, candidate: Candidate, tier: Tier
) -> None:
    assert POLICIES[policy](SQL, [candidate], SPILL) == [Ranked("gpu-0", tier)]
    other = replace(FREE, name="gpu-1", load=1)
    assert Ranked("gpu-0", tier) in POLICIES[policy](SQL, [candidate, other], SPILL)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_candidates_no_order(policy: str) -> None:
    assert POLICIES[policy](SQL, [], SPILL) == []
    assert POLICIES[policy](BASE, [], SPILL) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_unusable_comes_last_and_is_not_left_out(policy: str) -> None:
    down = replace(BUSY, name="a-down", usable=False)
    up = replace(FULL, name="b-up", load=99)
    assert names(POLICIES[policy](SQL, [down, up], SPILL)) == ["b-up", "a-down"]
    assert names(POLICIES[policy](SQL, [down], SPILL)) == ["a-down"]


def test_the_unusable_stand_among_themselves_as_they_would_otherwise() -> None:
    candidates = [
        replace(BUSY, name="holder", usable=False, load=99),
        replace(FREE, name="free", usable=False),
    ]
    assert names(lora_affinity(SQL, candidates, SPILL)) == ["holder", "free"]


def test_inside_a_tier_the_least_loaded_is_first() -> None:
    assert names(lora_affinity(SQL, fleet(7, 0, 3), SPILL)) == ["gpu-1", "gpu-2", "gpu-0"]


def test_a_load_counts_by_the_weight_that_carries_it() -> None:
    big, small = replace(FREE, name="big", load=3, weight=4.0), replace(FREE, name="small", load=1)
    assert names(lora_affinity(SQL, [big, small], SPILL)) == ["big", "small"]
    assert names(least_loaded(SQL, [big, small], SPILL)) == ["big", "small"]


def test_a_base_model_goes_to_the_least_loaded_and_needs_no_slot() -> None:
    candidates = [
        replace(RESIDENT, name="gpu-0", load=200),
        replace(FULL, name="gpu-1", load=1),
        replace(LOADING, name="gpu-2", load=30),
    ]
    assert lora_affinity(BASE, candidates, SPILL) == [
        Ranked("gpu-1", Tier.RESIDENT),
        Ranked("gpu-2", Tier.RESIDENT),
        Ranked("gpu-0", Tier.RESIDENT),
    ]


# --- lora-affinity: rendezvous -----------------------------------------------------------


def test_ties_are_broken_alike_in_every_process() -> None:
    """Written-out orders: they change only if placement changes for every deployment."""
    candidates = fleet(0, 0, 0, 0)
    assert names(lora_affinity(SQL, candidates, SPILL)) == ["gpu-1", "gpu-0", "gpu-2", "gpu-3"]
    chat = lora_affinity(Ask("chat"), candidates, SPILL)
    assert names(chat) == ["gpu-2", "gpu-1", "gpu-3", "gpu-0"]


def test_adapters_spread_over_upstreams_by_weight() -> None:
    candidates = [
        replace(one, weight=2.0 if n == 0 else 1.0) for n, one in enumerate(fleet(0, 0, 0))
    ]
    first = Counter(lora_affinity(Ask(f"a-{n}"), candidates, SPILL)[0].name for n in range(4000))
    assert first["gpu-0"] == pytest.approx(2000, rel=0.1)
    assert first["gpu-1"] == pytest.approx(1000, rel=0.1)
    assert first["gpu-2"] == pytest.approx(1000, rel=0.1)


def test_an_upstream_that_leaves_moves_only_its_own_adapters() -> None:
    candidates = fleet(0, 0, 0, 0, 0)
    moved = 0
    for n in range(1000):
        before = names(lora_affinity(Ask(f"a-{n}"), candidates, SPILL))
        after = names(lora_affinity(Ask(f"a-{n}"), candidates[:-1], SPILL))
        assert after == [name for name in before if name != "gpu-4"]
        moved += before[0] != after[0]
    assert moved == pytest.approx(200, rel=0.2)


def test_more_weight_brings_adapters_and_moves_none_among_the_others() -> None:
    before, after = fleet(0, 0, 0), fleet(0, 0, 0)
    after[0] = replace(after[0], weight=3.0)
    for n in range(300):
        old = lora_affinity(Ask(f"a-{n}"), before, SPILL)[0].name
        new = lora_affinity(Ask(f"a-{n}"), after, SPILL)[0].name
        assert new in {old, "gpu-0"}


# --- lora-affinity: the bound --------------------------------------------------------------


def test_a_holder_keeps_an_adapter_up_to_the_floor() -> None:
    holder, free = replace(BUSY, name="holder"), replace(FREE, name="free")
    at_floor = [replace(holder, load=15), free]
    assert lora_affinity(SQL, at_floor, Spill(floor=16))[0] == Ranked("holder", Tier.BUSY)
    above = [replace(holder, load=16), free]
    assert lora_affinity(SQL, above, Spill(floor=16)) == [
        Ranked("free", Tier.FREE, spilled=True),
        Ranked("holder", Tier.BUSY),
    ]


def test_a_holder_keeps_an_adapter_up_to_its_part_of_the_load() -> None:
    # With this request 80 are in flight, 20 each; a holder may have a quarter more: 25.
    others = fleet(20, 20, 15, of=FREE)
    holder = replace(BUSY, name="holder", load=24)
    assert lora_affinity(SQL, [holder, *others], Spill(1.25, 16))[0].name == "holder"
    holder, others = replace(holder, load=25), fleet(20, 19, 15, of=FREE)
    assert lora_affinity(SQL, [holder, *others], Spill(1.25, 16))[0].name == "gpu-2"


def test_the_part_goes_by_weight() -> None:
    # 30 in flight with this one; of 4 parts the holder has 3: 22.5, and a tenth more.
    small = replace(FREE, name="small", load=6)
    holder = replace(BUSY, name="holder", load=23, weight=3.0)
    assert lora_affinity(SQL, [holder, small], Spill(1.1, 1))[0].name == "holder"
    assert lora_affinity(SQL, [holder, small], Spill(1.0, 1))[0].name == "small"


def test_what_an_unusable_upstream_has_in_flight_makes_no_room() -> None:
    hung = replace(FREE, name="hung", usable=False, load=1000)
    holder, free = replace(BUSY, name="holder", load=20), replace(FREE, name="free")
    assert names(lora_affinity(SQL, [hung, holder, free], SPILL)) == ["free", "holder", "hung"]


def test_an_idle_holder_takes_what_a_busy_one_cannot() -> None:
    candidates = [
        replace(BUSY, name="busy", load=50),
        replace(RESIDENT, name="idle", load=9),
        replace(FREE, name="free"),
    ]
    assert lora_affinity(SQL, candidates, SPILL) == [
        Ranked("idle", Tier.RESIDENT, spilled=True),
        Ranked("free", Tier.FREE, spilled=True),
        Ranked("busy", Tier.BUSY),
    ]


def test_a_spill_is_worth_a_load_and_an_eviction_but_no_wait_for_a_slot() -> None:
    candidates = [
        replace(BUSY, name="holder", load=50),
        replace(LOADING, name="loading", load=3),
        replace(FREE, name="free", load=2),
        replace(EVICTABLE, name="evictable", load=1),
        replace(FULL, name="full", load=0),
    ]
    assert lora_affinity(SQL, candidates, SPILL) == [
        Ranked("loading", Tier.LOADING, spilled=True),
        Ranked("free", Tier.FREE, spilled=True),
        Ranked("evictable", Tier.EVICTABLE, spilled=True),
        Ranked("holder", Tier.BUSY),
        Ranked("full", Tier.FULL),
    ]


def test_no_request_spills_to_who_is_over_the_bound_too() -> None:
    candidates = [
        replace(BUSY, name="holder", load=60),
        replace(FREE, name="free", load=50),
        replace(EVICTABLE, name="evictable"),
    ]
    assert lora_affinity(SQL, candidates, SPILL) == [
        Ranked("evictable", Tier.EVICTABLE, spilled=True),
        Ranked("holder", Tier.BUSY),
        Ranked("free", Tier.FREE),
    ]


def test_an_upstream_that_stands_behind_anyway_has_not_spilled() -> None:
    candidates = [
        replace(BUSY, name="near", load=10),
        replace(RESIDENT, name="over", load=50),
        replace(FREE, name="free"),
    ]
    assert lora_affinity(SQL, candidates, SPILL) == [
        Ranked("near", Tier.BUSY),
        Ranked("free", Tier.FREE, spilled=True),
        Ranked("over", Tier.RESIDENT),
    ]


def test_a_flash_crowd_on_one_adapter_is_spread_over_as_many_as_it_needs() -> None:
    """Each of 400 requests goes to the first; all stay in flight."""
    candidates = {one.name: one for one in fleet(*[0] * 8)}
    for _ in range(400):
        first = lora_affinity(SQL, list(candidates.values()), Spill(1.25, 16))[0].name
        one = candidates[first]
        candidates[first] = replace(one, resident=True, busy=True, load=one.load + 1)
    loads = [one.load for one in candidates.values()]
    assert max(loads) <= 1.25 * 400 / 8 + 1
    quiet = {one.name: one for one in fleet(*[0] * 8)}
    for _ in range(16):
        first = lora_affinity(SQL, list(quiet.values()), Spill(1.25, 16))[0].name
        quiet[first] = replace(quiet[first], resident=True, busy=True, load=quiet[first].load + 1)
    assert sorted(one.load for one in quiet.values()) == [0] * 7 + [16]


# --- prefix-affinity ------------------------------------------------------------------------


def test_a_conversation_comes_back_whatever_the_load() -> None:
    ask = Ask("sql", b"You are a helpful assistant. Hello")
    homes = {
        prefix_affinity(ask, fleet(*loads, of=RESIDENT), NEVER)[0].name
        for loads in permutations((0, 3, 6, 9))
    }
    assert len(homes) == 1


def test_a_conversation_does_not_move_when_its_holder_comes_to_rest() -> None:
    ask = Ask("sql", b"hello")
    busy = fleet(3, 3, of=BUSY)
    home = prefix_affinity(ask, busy, SPILL)[0].name
    rest = [replace(one, busy=one.name != home) for one in busy]
    assert prefix_affinity(ask, rest, SPILL)[0] == Ranked(home, Tier.RESIDENT)


def test_conversations_spread_over_the_holders_only() -> None:
    candidates = [*fleet(0, 0, 0, of=RESIDENT), replace(FREE, name="free")]
    first = Counter(
        prefix_affinity(Ask("sql", b"conversation %d" % n), candidates, SPILL)[0].name
        for n in range(900)
    )
    assert first.keys() == {"gpu-0", "gpu-1", "gpu-2"}
    assert min(first.values()) > 240


def test_adapters_with_one_prefix_are_spread_too() -> None:
    asks = [Ask(f"a-{n}", b"You are a helpful assistant.") for n in range(100)]
    candidates = fleet(0, 0, of=RESIDENT)
    assert len({prefix_affinity(ask, candidates, SPILL)[0].name for ask in asks}) == 2


def test_names_and_prefixes_do_not_run_together() -> None:
    candidates = fleet(*[0] * 64, of=RESIDENT)
    one = names(prefix_affinity(Ask("sql", b"x"), candidates, SPILL))
    assert one != names(prefix_affinity(Ask("sqlx", b"x"), candidates, SPILL))
    assert one != names(prefix_affinity(Ask("sq", b"lx"), candidates, SPILL))


@pytest.mark.parametrize("ask", [Ask("sql", b"hello"), Ask(None, b"hello")])
def test_a_prefix_that_everybody_shares_spills_over(ask: Ask) -> None:
    candidates = {one.name: one for one in fleet(*[0] * 4, of=RESIDENT)}
    for _ in range(200):
        first = prefix_affinity(ask, list(candidates.values()), Spill(1.25, 4))[0].name
        candidates[first] = replace(candidates[first], load=candidates[first].load + 1)
    assert max(one.load for one in candidates.values()) <= 1.25 * 200 / 4 + 1


def test_a_prefix_that_spills_says_so() -> None:
    ask = Ask("sql", b"hello")
    candidates = fleet(0, 0, of=RESIDENT)
    home, second = names(prefix_affinity(ask, candidates, SPILL))
    candidates = [replace(one, load=30 if one.name == home else 0) for one in candidates]
    assert prefix_affinity(ask, candidates, SPILL) == [
        Ranked(second, Tier.RESIDENT, spilled=True),
        Ranked(home, Tier.RESIDENT),
    ]


@pytest.mark.parametrize("adapter", ["sql", None])
def test_without_a_prefix_the_load_decides(adapter: str | None) -> None:
    candidates = fleet(3, 0, 2, of=RESIDENT)
    assert names(prefix_affinity(Ask(adapter), candidates, SPILL)) == ["gpu-1", "gpu-2", "gpu-0"]


# --- least-loaded, round-robin --------------------------------------------------------------


def test_least_loaded_does_not_care_who_holds_the_adapter() -> None:
    candidates = [
        replace(BUSY, name="busy", load=2),
        replace(FULL, name="full", load=1),
        replace(FREE, name="free", load=3),
    ]
    assert least_loaded(SQL, candidates, SPILL) == [
        Ranked("full", Tier.FULL),
        Ranked("busy", Tier.BUSY),
        Ranked("free", Tier.FREE),
    ]


def test_round_robin_takes_the_usable_in_turn() -> None:
    candidates = [replace(BUSY, name="b", load=9), FREE, replace(FREE, name="z"), EVICTABLE]
    candidates[1] = replace(FREE, name="a", usable=False)
    candidates[3] = replace(EVICTABLE, name="c")
    turns = [names(round_robin(Ask("sql", turn=turn), candidates, SPILL)) for turn in range(4)]
    assert turns == [
        ["b", "c", "z", "a"],
        ["c", "z", "b", "a"],
        ["z", "b", "c", "a"],
        ["b", "c", "z", "a"],
    ]


def test_round_robin_with_nobody_usable() -> None:
    candidates = [replace(one, usable=False) for one in fleet(0, 0)]
    assert names(round_robin(Ask("sql", turn=7), candidates, SPILL)) == ["gpu-0", "gpu-1"]


# --- whatever the fleet looks like ----------------------------------------------------------

ASKS = st.builds(
    Ask, st.none() | st.text(), prefix=st.binary(max_size=4), turn=st.integers(0, 1 << 70)
)
SPILLS = st.builds(Spill, st.floats(1.0, 4.0), st.integers(1, 4))


@st.composite
def candidates_of(draw: st.DrawFn, usable: st.SearchStrategy[bool]) -> Candidate:
    resident = draw(st.booleans())
    return Candidate(
        name=draw(st.text("abc", min_size=1, max_size=3)),
        usable=draw(usable),
        resident=resident,
        busy=resident and draw(st.booleans()),
        loading=draw(st.booleans()),
        free=draw(st.booleans()),
        evictable=draw(st.booleans()),
        load=draw(st.integers(0, 8)),
        weight=draw(st.sampled_from([0.1, 1.0, 2.5])),
    )


def fleets(usable: st.SearchStrategy[bool]) -> st.SearchStrategy[list[Candidate]]:
    return st.lists(candidates_of(usable), unique_by=lambda one: one.name, max_size=8)


@pytest.mark.parametrize("policy", POLICIES)
@given(
    ask=ASKS,
    candidates=fleets(st.booleans()),
    spill=SPILLS,
    shuffle=st.randoms(use_true_random=False),
)
def test_every_candidate_has_one_place_whatever_order_they_come_in(
    policy: str, ask: Ask, candidates: list[Candidate], spill: Spill, shuffle: Random
) -> None:
    order = POLICIES[policy](ask, candidates, spill)
    assert sorted(names(order)) == sorted(one.name for one in candidates)
    usable = {one.name for one in candidates if one.usable}
    assert {place.name for place in order[: len(usable)]} == usable
    shuffled = list(candidates)
    shuffle.shuffle(shuffled)
    assert POLICIES[policy](ask, shuffled, spill) == order


def over_bound(candidates: Sequence[Candidate], spill: Spill) -> set[str]:
    """Who has no room for one more, straight from the definition."""
    load = sum(one.load for one in candidates) + 1
    weight = sum(one.weight for one in candidates)
    return {
        one.name
        for one in candidates
        if one.load + 1 > max(spill.floor, spill.factor * load / weight * one.weight)
    }


@pytest.mark.parametrize("policy", [lora_affinity, prefix_affinity])
@given(
    ask=st.builds(Ask, st.text(), prefix=st.binary(max_size=2)),
    candidates=fleets(st.just(True)),
    spill=SPILLS,
)
def test_a_holder_with_room_goes_first_and_one_without_gives_way_to_whoever_has_some(
    policy: Policy, ask: Ask, candidates: list[Candidate], spill: Spill
) -> None:
    order = policy(ask, candidates, spill)
    over = over_bound(candidates, spill)
    for before, after in combinations(order, 2):
        # Nothing speaks for the one behind.
        assert not (after.tier < Tier.FULL and before.tier is Tier.FULL)
        if after.name not in over:
            assert not (after.tier <= Tier.RESIDENT < before.tier)
            assert not (after.tier < Tier.FULL and before.name in over)


@pytest.mark.parametrize("policy", [lora_affinity, prefix_affinity])
@given(
    ask=st.builds(Ask, st.text(), prefix=st.binary(max_size=2)),
    candidates=fleets(st.booleans()),
    spill=SPILLS,
)
def test_who_spilled_stands_before_a_holder_that_is_before_it_without_a_bound(
    policy: Policy, ask: Ask, candidates: list[Candidate], spill: Spill
) -> None:
    order = policy(ask, candidates, spill)
    without = {one.name: at for at, one in enumerate(policy(ask, candidates, NEVER))}
    holders = {one.name for one in candidates if one.resident and one.usable}
    for at, ranked in enumerate(order):
        passed = [
            behind.name
            for behind in order[at + 1 :]
            if behind.name in holders and without[behind.name] < without[ranked.name]
        ]
        assert ranked.spilled == bool(passed)


@given(
    adapter=st.text(),
    candidates=fleets(st.booleans()),
    load=st.integers(0, 100),
    data=st.data(),
)
def test_with_equal_loads_who_leaves_changes_nothing_among_the_others(
    adapter: str, candidates: list[Candidate], load: int, data: st.DataObject
) -> None:
    candidates = [replace(one, load=load, weight=1.0) for one in candidates]
    order = names(lora_affinity(Ask(adapter), candidates, SPILL))
    gone = data.draw(st.sets(st.sampled_from(order)) if order else st.just(set()))
    left = [one for one in candidates if one.name not in gone]
    expected = [name for name in order if name not in gone]
    assert names(lora_affinity(Ask(adapter), left, SPILL)) == expected


@pytest.mark.parametrize("tier", Tier)
def test_a_tiers_label_is_fit_for_a_metric(tier: Tier) -> None:
    assert tier.label in {"busy", "resident", "loading", "free", "evictable", "full"}
