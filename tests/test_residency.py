"""Conversations with one upstream's slots, then random ones against a model of the server."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_proxy import residency
from lora_proxy.errors import ProxyError
from lora_proxy.residency import Command, Grant, Load, Refuse, Slots, Unload

BAD = ProxyError("adapter_invalid", "broken weights")
BUSY = ProxyError("adapter_load_failed", "try later")


def holding(capacity: int | None, *served: str) -> Slots:
    """Slots in which these names are resident and idle, the first one longest."""
    slots = Slots(capacity)
    for name in served:
        assert slots.acquire(name, name, 0) == [Load(name)]
        slots.loaded(name)
        slots.release(name)
    return slots


def generation_of(slots: Slots, served: str) -> int:
    """The generation of a resident name, learned the only way there is: by a lease."""
    (grant,) = slots.acquire("probe", served, 0)
    assert isinstance(grant, Grant)
    slots.release("probe")
    return grant.generation


def left_behind(slots: Slots) -> dict[str, object]:
    """What would be a leak once every request and every command has ended."""
    names = ("_leases", "_waiting", "_queue", "_loading", "_unloading", "_retired")
    return {name: held for name in names if (held := getattr(slots, name))}


# -- one adapter --------------------------------------------------------------------------


def test_a_cold_adapter_is_loaded_and_then_granted() -> None:
    slots = Slots(2)
    assert slots.acquire(1, "sql", 0) == [Load("sql")]
    assert slots.loading("sql")
    assert not slots.resident("sql")
    assert slots.loaded("sql") == [Grant(1, "sql", 1)]
    assert slots.resident("sql")
    assert not slots.loading("sql")
    assert slots.leases("sql") == 1
    assert slots.release(1) == []
    assert slots.leases("sql") == 0
    assert slots.resident("sql")


def test_a_resident_adapter_is_granted_at_once() -> None:
    slots = holding(1, "sql")
    assert slots.acquire(1, "sql", 0) == [Grant(1, "sql", 1)]
    assert slots.acquire(2, "sql", 0) == [Grant(2, "sql", 1)]
    assert slots.leases("sql") == 2


def test_however_many_wait_there_is_one_load_and_they_are_granted_in_order() -> None:
    slots = Slots(1)
    assert [slots.acquire(n, "sql", 0) for n in range(200)] == [[Load("sql")], *[[]] * 199]
    assert slots.waiting == 200
    assert slots.loaded("sql") == [Grant(n, "sql", 1) for n in range(200)]
    assert slots.waiting == 0


def test_an_adopted_module_is_granted_and_unloaded_under_its_own_name() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql@1", 0)
    assert slots.loaded("sql@1", "sql") == [Grant(1, "sql", 1)]
    assert slots.residents == {"sql@1": "sql"}
    slots.release(1)
    assert slots.acquire(2, "chat", 0) == [Unload("sql", "evicted")]
    assert slots.unloaded("sql@1") == []
    assert slots.unloaded("sql") == [Load("chat")]


def test_what_is_waited_for_is_coming_whether_it_loads_or_queues() -> None:
    slots = Slots(1)
    slots.acquire(1, "a", 0)
    slots.acquire(2, "b", 0)
    assert (slots.coming("a"), slots.coming("b"), slots.coming("c")) == (True, True, False)
    assert (slots.loading("a"), slots.loading("b")) == (True, False)
    slots.loaded("a")
    slots.release(2)
    assert not slots.coming("a")
    assert not slots.coming("b")


def test_two_names_of_one_adopted_module_are_unloaded_once_both_may_go() -> None:
    slots = Slots(2)
    slots.acquire(1, "a", 0)
    slots.loaded("a", "shared")
    slots.acquire(2, "b", 0)
    slots.loaded("b", "shared")
    slots.release(1)
    assert slots.acquire(3, "c", 0) == [Load("c")]  # a's slot is free, without a call
    assert not slots.resident("a")
    slots.loaded("c")
    assert slots.retire("b") == []
    assert slots.release(2) == [Unload("shared", "retired")]


def test_a_module_that_is_being_unloaded_is_not_unloaded_twice() -> None:
    slots = Slots(None)
    slots.acquire(1, "a", 0)
    slots.acquire(2, "b", 0)
    slots.loaded("a", "shared")
    slots.release(1)
    assert slots.retire("a") == [Unload("shared", "retired")]
    slots.loaded("b", "shared")  # from a list that was older than the unload
    slots.release(2)
    assert slots.retire("b") == []
    assert slots.unloaded("shared") == []
    assert left_behind(slots) == {}


def test_a_shared_modules_slot_goes_to_the_queue_without_a_wait() -> None:
    slots = Slots(3)
    for name in ("old", "a", "b"):
        slots.acquire(name, name, 0)
        slots.loaded(name, name if name == "old" else "shared")
        slots.release(name)
    assert slots.acquire(1, "c", 0) == [Unload("old", "evicted")]
    assert slots.retire("a") == [Load("c")]


@pytest.mark.parametrize("ticket", [1, 2])
def test_a_ticket_is_one_request(ticket: int) -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.loaded("sql")
    slots.acquire(2, "chat", 0)
    with pytest.raises(ValueError, match="in use"):
        slots.acquire(ticket, "sql", 0)


def test_a_ticket_can_be_used_again_after_its_release() -> None:
    slots = holding(1, "sql")
    assert slots.acquire(1, "sql", 0) == [Grant(1, "sql", 1)]
    slots.release(1)
    assert slots.acquire(1, "sql", 0) == [Grant(1, "sql", 1)]


def test_a_release_counts_once_and_an_unknown_one_not_at_all() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "sql", 0)
    assert slots.release(1) == slots.release(1) == slots.release("nobody") == []
    assert slots.leases("sql") == 1


@pytest.mark.parametrize("capacity", [0, -1])
def test_no_slots_at_all_is_a_mistake(capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Slots(capacity)


# -- cancelled requests -------------------------------------------------------------------


def test_who_leaves_is_not_granted() -> None:
    slots = Slots(1)
    for ticket in (1, 2, 3):
        slots.acquire(ticket, "sql", 0)
    assert slots.release(2) == []
    assert slots.loaded("sql") == [Grant(1, "sql", 1), Grant(3, "sql", 1)]
    assert slots.leases("sql") == 2


def test_a_load_that_everybody_left_ends_in_an_idle_adapter() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.release(1)
    assert slots.loaded("sql") == []
    assert slots.resident("sql")
    assert left_behind(slots) == {}
    assert slots.acquire(2, "chat", 0) == [Unload("sql", "evicted")]


def test_who_comes_after_everybody_left_joins_the_load_under_way() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.release(1)
    assert slots.acquire(2, "sql", 0) == []
    assert slots.loaded("sql") == [Grant(2, "sql", 1)]


def test_a_queued_adapter_that_everybody_left_is_not_loaded() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    assert slots.acquire(2, "chat", 0) == []
    assert slots.release(2) == []
    assert slots.release(1) == []
    assert slots.residents == {"sql": "sql"}
    assert left_behind(slots) == {}


def test_a_slot_freed_for_somebody_who_left_goes_to_the_next() -> None:
    slots = holding(1, "sql")
    assert slots.acquire(1, "chat", 0) == [Unload("sql", "evicted")]
    assert slots.acquire(2, "code", 0) == []
    slots.release(1)
    assert slots.unloaded("sql") == [Load("code")]


def test_a_slot_freed_for_nobody_stays_free() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "chat", 0)
    slots.release(1)
    assert slots.unloaded("sql") == []
    assert slots.free == 1


# -- capacity -----------------------------------------------------------------------------


def test_the_longest_idle_adapter_makes_room_and_the_load_waits_for_it_to_go() -> None:
    slots = holding(2, "sql", "chat")
    slots.acquire(1, "sql", 0)
    slots.release(1)
    assert slots.acquire(2, "code", 0) == [Unload("chat", "evicted")]
    assert not slots.resident("chat")
    assert slots.free == 0
    assert slots.unloaded("chat") == [Load("code")]
    assert slots.loaded("code") == [Grant(2, "code", generation_of(slots, "code"))]


def test_an_adapter_in_use_is_never_evicted() -> None:
    slots = holding(2, "sql", "chat")
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "chat", 0)
    assert slots.acquire(3, "code", 0) == []
    assert slots.busy == 2
    assert slots.release(2) == [Unload("chat", "evicted")]


def test_the_queue_is_served_in_order_one_slot_each() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    assert slots.acquire(2, "chat", 0) == slots.acquire(3, "code", 0) == []
    assert slots.acquire(4, "chat", 0) == []
    assert slots.release(1) == [Unload("sql", "evicted")]
    assert slots.unloaded("sql") == [Load("chat")]
    chat = slots.loaded("chat")
    assert [grant.ticket for grant in chat if isinstance(grant, Grant)] == [2, 4]
    assert slots.release(2) == []
    assert slots.release(4) == [Unload("chat", "evicted")]
    assert slots.unloaded("chat") == [Load("code")]


def test_a_failed_load_frees_its_slot_for_the_queue() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "chat", 0)
    assert slots.load_failed("sql", BAD, None) == [Refuse(1, BAD), Load("chat")]


def test_a_load_that_everybody_left_gives_way_to_the_queue() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "chat", 0)
    slots.release(1)
    assert slots.loaded("sql") == [Unload("sql", "evicted")]


def test_without_a_bound_nothing_is_evicted() -> None:
    slots = Slots(None)
    assert [slots.acquire(n, f"a{n}", 0) for n in range(100)] == [
        [Load(f"a{n}")] for n in range(100)
    ]
    assert slots.free is None
    assert slots.available


def test_an_adapter_wanted_again_while_it_is_unloaded_is_loaded_once_it_has_gone() -> None:
    slots = holding(None, "sql")
    assert slots.retire("sql") == [Unload("sql", "retired")]
    assert slots.acquire(1, "sql", 0) == []
    assert slots.unloaded("sql") == [Load("sql")]


def test_an_adapter_that_waits_for_its_own_unload_does_not_hold_up_the_next() -> None:
    slots = holding(2, "sql")
    slots.retire("sql")
    assert slots.acquire(1, "sql", 0) == []
    assert slots.acquire(2, "chat", 0) == [Load("chat")]
    assert slots.unloaded("sql") == [Load("sql")]


def test_available_means_a_slot_without_waiting_for_a_lease() -> None:
    slots = Slots(1)
    assert slots.available
    slots.acquire(1, "sql", 0)
    assert not slots.available  # the one slot is loading
    slots.loaded("sql")
    assert not slots.available  # in use
    slots.release(1)
    assert slots.available  # idle
    slots.acquire(2, "chat", 0)
    assert not slots.available  # being emptied, for somebody else
    slots.release(2)
    assert slots.available  # being emptied, for nobody any more


# -- failures -----------------------------------------------------------------------------


def test_a_bad_adapter_refuses_those_who_wait_and_those_who_come_until_forgiven() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "sql", 0)
    assert slots.load_failed("sql", BAD, None) == [Refuse(1, BAD), Refuse(2, BAD)]
    assert slots.acquire(3, "sql", 1e9) == [Refuse(3, BAD)]
    assert slots.failure("sql", 1e9) is BAD
    assert left_behind(slots) == {}
    slots.forgive("sql")
    assert slots.failure("sql", 1e9) is None
    assert slots.acquire(3, "sql", 1e9) == [Load("sql")]


def test_a_failure_that_may_pass_is_tried_again_in_time() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 10)
    slots.load_failed("sql", BUSY, 12.0)
    assert slots.acquire(2, "sql", 11.9) == [Refuse(2, BUSY)]
    assert slots.acquire(3, "sql", 12.0) == [Load("sql")]


def test_the_last_failure_is_the_one_told_and_a_success_ends_it() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.load_failed("sql", BAD, 1.0)
    slots.acquire(2, "sql", 1)
    slots.load_failed("sql", BUSY, 5.0)
    assert slots.failure("sql", 2) is BUSY
    slots.acquire(3, "sql", 5)
    slots.loaded("sql")
    assert slots.failure("sql", 2) is None


def test_a_changed_adapter_does_not_inherit_the_failure() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql@1", 0)
    slots.load_failed("sql@1", BAD, None)
    assert slots.acquire(2, "sql@2", 0) == [Load("sql@2")]


def test_a_failure_raised_for_many_keeps_nobodys_frames() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    error = ProxyError("adapter_invalid", "broken weights")
    slots.load_failed("sql", error, None)
    for ticket in (2, 3):
        (refusal,) = slots.acquire(ticket, "sql", 0)
        assert isinstance(refusal, Refuse)
        assert refusal.error.__traceback__ is None
        with pytest.raises(ProxyError):
            raise refusal.error


def test_only_so_many_failures_are_remembered() -> None:
    slots = Slots(None)
    for n in range(residency.REMEMBERED + 1):
        slots.acquire(n, f"a{n}", 0)
        slots.load_failed(f"a{n}", BAD, None)
    assert slots.failure("a0", 0) is None
    assert slots.failure("a1", 0) is BAD
    assert len(slots._failures) == len(slots._departed) == residency.REMEMBERED


def test_a_failure_that_happens_again_is_remembered_longest() -> None:
    slots = Slots(None)
    for n in [*range(residency.REMEMBERED), 0, residency.REMEMBERED]:
        assert slots.acquire("ticket", f"a{n}", 1) == [Load(f"a{n}")]
        slots.load_failed(f"a{n}", BUSY, 1.0)
    assert slots.failure("a0", 0) is BUSY
    assert slots.failure("a1", 0) is None
    assert "a0" in slots._departed
    assert "a1" not in slots._departed


# -- what the server forgot ---------------------------------------------------------------


def test_many_answers_that_it_is_lost_cause_one_load() -> None:
    slots = holding(1, "sql")
    for ticket in range(20):
        assert slots.acquire(ticket, "sql", 0) == [Grant(ticket, "sql", 1)]
    commands: list[Command] = []
    for ticket in range(20):
        commands += slots.lost("sql", 1)
        commands += slots.release(ticket)
        commands += slots.acquire(ticket, "sql", 0)
    assert commands == [Load("sql")]
    again = slots.loaded("sql")
    assert [grant.ticket for grant in again if isinstance(grant, Grant)] == list(range(20))
    assert slots.lost("sql", 1) == []
    assert slots.resident("sql")


def test_a_lease_outlives_the_loss_and_does_not_count_for_the_next_stay() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    slots.lost("sql", 1)
    assert slots.leases("sql") == 0
    slots.acquire(2, "sql", 0)
    slots.loaded("sql")
    assert slots.leases("sql") == 1
    assert slots.release(1) == []
    assert slots.leases("sql") == 1
    assert slots.release(2) == []
    assert left_behind(slots) == {}


def test_a_lost_adapter_frees_its_slot_without_an_unload() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    assert slots.acquire(2, "chat", 0) == []
    assert slots.lost("sql", 1) == [Load("chat")]
    assert slots.release(1) == []


def test_a_loss_that_nobody_believed_resident_is_no_matter() -> None:
    slots = Slots(1)
    assert slots.lost("sql", 0) == []
    slots.acquire(1, "sql", 0)
    assert slots.lost("sql", 0) == []
    assert slots.loaded("sql") == [Grant(1, "sql", 1)]


@pytest.mark.parametrize("when", ["absent", "loaded", "unloaded"])
def test_an_answer_to_nothing_asked_is_no_matter(when: str) -> None:
    slots = Slots(1) if when == "absent" else holding(1, "sql")
    if when == "unloaded":
        slots.retire("sql")
        slots.unloaded("sql")
    before = slots.residents
    assert slots.loaded("sql") == slots.load_failed("sql", BAD, None) == slots.unloaded("sql") == []
    assert slots.residents == before
    assert slots.failure("sql", 0) is None


# -- what the server lists ----------------------------------------------------------------


def test_a_restart_is_an_empty_list() -> None:
    slots = holding(3, "sql", "chat")
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "code", 0)
    assert slots.reported({}, slots.marker()) == []
    assert slots.residents == {}
    assert slots.release(1) == []
    assert slots.acquire(3, "sql", 0) == [Load("sql")]
    assert slots.loading("code")


def test_a_restart_frees_the_slots_for_the_queue() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "chat", 0)
    assert slots.reported({}, slots.marker()) == [Load("chat")]


def test_what_is_listed_is_known() -> None:
    slots = Slots(2)
    assert slots.reported({"sql@1": "sql", "chat": "chat"}, slots.marker()) == []
    assert slots.residents == {"sql@1": "sql", "chat": "chat"}
    (grant,) = slots.acquire(1, "sql@1", 0)
    assert grant == Grant(1, "sql", generation_of(slots, "sql@1"))


def test_a_list_that_confirms_changes_nothing() -> None:
    slots = holding(2, "sql", "chat")
    marker = slots.marker()
    assert slots.reported({"sql": "sql", "chat": "chat"}, marker) == []
    assert slots.marker() == marker
    assert slots.acquire(1, "code", 0) == [Unload("sql", "evicted")]


def test_a_listed_adapter_is_granted_to_those_who_queue_for_it() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "chat", 0)
    (grant,) = slots.reported({"sql": "sql", "chat": "chat"}, slots.marker())
    assert isinstance(grant, Grant)
    assert (grant.ticket, grant.module) == (2, "chat")


def test_a_listed_adapter_under_another_module_is_another_stay() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    assert slots.reported({"sql": "static"}, slots.marker()) == []
    assert slots.leases("sql") == 0
    (grant,) = slots.acquire(2, "sql", 0)
    assert isinstance(grant, Grant)
    assert (grant.module, grant.generation > 1) == ("static", True)
    assert slots.release(1) == []
    assert slots.leases("sql") == 1


def test_a_listed_adapter_is_no_failure_any_more() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.load_failed("sql", BAD, None)
    slots.reported({"sql": "sql"}, slots.marker())
    assert slots.failure("sql", 0) is None


def test_more_than_fit_are_evicted_when_a_slot_is_needed_and_not_before() -> None:
    slots = Slots(1)
    assert slots.reported({"a": "a", "b": "b", "c": "c"}, slots.marker()) == []
    assert slots.free == 0
    unloads = slots.acquire(1, "d", 0)
    assert unloads == [Unload(name, "evicted") for name in "abc"]
    assert slots.unloaded("a") == slots.unloaded("b") == []
    assert slots.unloaded("c") == [Load("d")]


@pytest.mark.parametrize("event", ["loaded", "lost", "unloaded", "load_failed"])
def test_a_list_older_than_an_event_does_not_undo_it(event: str) -> None:
    slots = holding(2, "sql")
    old = slots.marker()
    listed: Mapping[str, str] = {"sql": "sql"}
    if event == "loaded":
        slots.acquire(1, "chat", 0)
        slots.loaded("chat")
    elif event == "lost":
        slots.lost("sql", 1)
    elif event == "unloaded":
        slots.retire("sql")
        slots.unloaded("sql")
    else:
        slots.acquire(1, "chat", 0)
        slots.load_failed("chat", BAD, None)
        listed = {"sql": "sql", "chat": "chat"}
    before = slots.residents
    assert slots.reported(listed, old) == []
    assert slots.residents == before


def test_what_is_under_way_is_left_to_its_own_answer() -> None:
    slots = holding(2, "sql")
    slots.acquire(1, "chat", 0)
    slots.retire("sql")
    assert slots.reported({"sql": "sql", "chat": "chat"}, slots.marker()) == []
    assert slots.residents == {}
    assert slots.loaded("chat") == [Grant(1, "chat", generation_of(slots, "chat"))]


def test_an_old_list_teaches_nothing_once_departures_are_forgotten() -> None:
    slots = holding(None, "sql")
    old = slots.marker()
    slots.lost("sql", 1)
    for n in range(residency.REMEMBERED):
        slots.acquire(n, f"a{n}", 0)
        slots.load_failed(f"a{n}", BAD, None)
    assert "sql" not in slots._departed
    slots.reported({"sql": "sql"}, old)
    assert not slots.resident("sql")
    slots.reported({"sql": "sql"}, slots.marker())
    assert slots.resident("sql")


# -- retiring -----------------------------------------------------------------------------


def test_a_retired_adapter_goes_at_once_if_idle() -> None:
    slots = holding(2, "sql")
    assert slots.retire("sql") == [Unload("sql", "retired")]
    assert slots.retire("sql") == []
    assert slots.unloaded("sql") == []
    assert slots.free == 2


def test_a_retired_adapter_goes_with_its_last_lease() -> None:
    slots = holding(2, "sql")
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "sql", 0)
    assert slots.retire("sql") == []
    assert slots.release(1) == []
    assert slots.release(2) == [Unload("sql", "retired")]
    slots.unloaded("sql")
    assert left_behind(slots) == {}


def test_who_waits_for_a_retired_adapter_still_gets_it() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.retire("sql")
    assert slots.loaded("sql") == [Grant(1, "sql", 1)]
    assert slots.release(1) == [Unload("sql", "retired")]


def test_who_queues_for_a_retired_adapter_still_gets_it() -> None:
    slots = Slots(1)
    slots.acquire(1, "chat", 0)
    slots.acquire(2, "sql", 0)
    slots.retire("sql")
    assert slots.load_failed("chat", BAD, None) == [Refuse(1, BAD), Load("sql")]
    slots.loaded("sql")
    assert slots.release(2) == [Unload("sql", "retired")]


def test_a_retired_adapter_that_nobody_waits_for_goes_as_soon_as_it_has_come() -> None:
    slots = Slots(1)
    slots.acquire(1, "sql", 0)
    slots.release(1)
    slots.retire("sql")
    assert slots.loaded("sql") == [Unload("sql", "retired")]


def test_a_retired_adapter_that_is_asked_for_stays() -> None:
    slots = holding(2, "sql")
    slots.acquire(1, "sql", 0)
    slots.retire("sql")
    slots.acquire(2, "sql", 0)
    assert slots.release(1) == slots.release(2) == []
    assert slots.resident("sql")


@pytest.mark.parametrize("end", ["failed", "left", "lost", "never there"])
def test_a_retirement_ends_with_the_adapter(end: str) -> None:
    slots = Slots(1)
    if end == "failed":
        slots.acquire(1, "sql", 0)
        slots.retire("sql")
        slots.load_failed("sql", BUSY, 0.0)
    elif end == "left":
        slots.acquire(1, "chat", 0)
        slots.acquire(2, "sql", 0)
        slots.retire("sql")
        slots.release(2)
        slots.loaded("chat")
        slots.release(1)
    elif end == "lost":
        slots.acquire(1, "sql", 0)
        (grant,) = slots.loaded("sql")
        assert isinstance(grant, Grant)
        slots.retire("sql")
        slots.lost("sql", grant.generation)
        slots.release(1)
    else:
        slots.retire("sql")
    assert left_behind(slots) == {}


def test_a_retired_adapters_slot_goes_to_the_queue() -> None:
    slots = holding(1, "sql")
    slots.acquire(1, "sql", 0)
    slots.acquire(2, "chat", 0)
    slots.retire("sql")
    assert slots.release(1) == [Unload("sql", "retired")]
    assert slots.unloaded("sql") == [Load("chat")]


# -- pins, sweeps, successors, sizes ------------------------------------------------------


def test_a_pinned_adapter_is_not_evicted_and_an_unpinned_one_is() -> None:
    slots = holding(2, "a", "b")
    slots.pin("a")
    assert slots.acquire(1, "c", 0) == [Unload("b", "evicted")]
    assert slots.unloaded("b") == [Load("c")]
    slots.loaded("c")
    assert slots.acquire(2, "d", 0) == []  # c is in use, a is pinned
    assert slots.unpin("a") == [Unload("a", "evicted")]
    assert slots.unloaded("a") == [Load("d")]


def test_a_pin_may_come_before_the_adapter_and_outlives_its_loss() -> None:
    slots = Slots(1)
    slots.pin("a")
    slots.acquire(1, "a", 0)
    slots.loaded("a")
    slots.release(1)
    assert slots.acquire(2, "b", 0) == []
    assert slots.reported({}, slots.marker()) == [Load("b")]
    slots.loaded("b")
    assert slots.acquire(3, "a", 0) == []
    assert slots.release(2) == [Unload("b", "evicted")]
    assert slots.unloaded("b") == [Load("a")]
    slots.loaded("a")
    slots.release(3)
    assert slots.acquire(4, "b", 0) == []


def test_a_pinned_adapter_in_use_stays_when_it_is_unpinned() -> None:
    slots = holding(1, "a")
    slots.pin("a")
    slots.acquire(1, "a", 0)
    assert slots.unpin("a") == []
    assert slots.acquire(2, "b", 0) == []
    assert slots.release(1) == [Unload("a", "evicted")]


def test_retiring_a_pinned_adapter_unpins_it() -> None:
    slots = holding(None, "a")
    slots.pin("a")
    assert slots.retire("a") == [Unload("a", "retired")]


def test_a_sweep_unloads_what_was_idle_all_the_time() -> None:
    slots = holding(None, "a", "b", "pinned")
    slots.pin("pinned")
    assert slots.sweep(2) == []
    slots.acquire(1, "b", 0)
    slots.release(1)
    assert slots.sweep(2) == []
    assert slots.sweep(2) == [Unload("a", "idle")]
    slots.acquire(2, "b", 0)
    assert [slots.sweep(1) for _ in range(5)] == [[]] * 5
    assert slots.resident("pinned")


def test_a_successor_is_loaded_over_the_capacity_and_takes_the_slot() -> None:
    slots = holding(1, "a@1")
    slots.acquire("old", "a@1", 0)
    assert slots.acquire(1, "a@2", 0, beside=True) == [Load("a@2")]
    assert slots.acquire(2, "a@2", 0, beside=True) == []  # one load, as ever
    assert [grant.ticket for grant in slots.loaded("a@2") if isinstance(grant, Grant)] == [1, 2]
    assert slots.retire("a@1") == []
    assert slots.release("old") == [Unload("a@1", "retired")]
    assert slots.unloaded("a@1") == []
    assert slots.acquire(3, "b", 0) == []  # full again: what was borrowed is given back


def test_a_successor_that_is_on_its_way_out_waits_for_that() -> None:
    slots = holding(None, "a")
    assert slots.retire("a") == [Unload("a", "retired")]
    assert slots.acquire(1, "a", 0, beside=True) == []
    assert slots.unloaded("a") == [Load("a")]


def test_more_capacity_starts_what_is_queued_and_less_evicts_when_needed() -> None:
    slots = holding(1, "a")
    slots.acquire(1, "a", 0)
    assert slots.acquire(2, "b", 0) == []
    assert slots.resize(2) == [Load("b")]
    slots.loaded("b")
    slots.release(1)
    assert slots.resize(1) == []
    assert slots.acquire(3, "c", 0) == [Unload("a", "evicted")]
    assert slots.unloaded("a") == []  # still over: b is in use
    slots.release(2)
    with pytest.raises(ValueError, match="at least 1"):
        slots.resize(0)


# -- random schedules ---------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")


@dataclass
class Holder:
    """A granted ticket, as the test sees it."""

    served: str
    module: str
    generation: int
    weights: int | None  # what the server had under the module at the grant


class Server:
    """A vLLM server's list of modules; each stay of a module has weights of its own."""

    def __init__(self) -> None:
        self.modules: dict[str, int] = {}
        self._stays = 0

    def load(self, module: str) -> None:
        if module not in self.modules:
            self._stays += 1
            self.modules[module] = self._stays


class Schedules(RuleBasedStateMachine):
    """Any order of everything that can happen, checked against a model of the server.

    While `alone`, nobody else changes the server and it reports failures truly; then what
    the slots believe and what the server holds can be compared. Otherwise another client
    of the server may load and unload, loads that were reported as failed may have worked,
    and the other way round for unloads.
    """

    @initialize(capacity=st.sampled_from([1, 2, 3, None]), alone=st.booleans())
    def begin(self, capacity: int | None, alone: bool) -> None:  # noqa: FBT001  # drawn by name
        self.slots = Slots(capacity)
        self.capacity = capacity
        self.alone = alone
        self.server = Server()
        self.restarted = False
        self.now = 0.0
        self.tickets = 0
        self.waiting: dict[int, str] = {}
        self.holders: dict[int, Holder] = {}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.failures: dict[str, tuple[ProxyError, float | None]] = {}
        self.retired: set[str] = set()
        self.pinned: set[str] = set()
        self.asked: list[tuple[int, dict[str, str]]] = []

    # What the slots command.

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Grant():
                    self.granted(command)
                case Refuse(ticket, error):
                    assert isinstance(ticket, int)
                    served = self.waiting.pop(ticket)  # waits, and is answered once
                    assert error is self.failures[served][0]
                case Load(served):
                    self.load(served)
                case Unload(module):
                    self.unload(module)

    def granted(self, grant: Grant) -> None:
        assert isinstance(grant.ticket, int)
        served = self.waiting.pop(grant.ticket)  # waits, and is answered once
        assert grant.module in {served, f"static-{served}"}
        weights = self.server.modules.get(grant.module)
        if self.alone and not self.restarted:
            assert weights is not None, "granted what the server does not hold"
        self.holders[grant.ticket] = Holder(served, grant.module, grant.generation, weights)

    def load(self, served: str) -> None:
        assert served not in self.loads, "two loads of one name at once"
        assert served in self.waiting.values(), "a load that nobody waits for"
        self.loads.append(served)
        self.within_capacity()

    def unload(self, module: str) -> None:
        assert module not in self.unloads, "two unloads of one module at once"
        if self.alone:
            used = {h.weights for h in self.holders.values() if h.module == module}
            assert self.server.modules.get(module, 0) not in used, "evicted while in use"
        assert module.removeprefix("static-") not in self.pinned, "unloaded though pinned"
        self.unloads.append(module)

    def within_capacity(self) -> None:
        """A load may only start where there is room for it, in belief and in truth."""
        if self.capacity is None:
            return
        believed = len(self.slots.residents) + len(self.loads) + len(self.unloads)
        assert believed <= self.capacity
        if self.alone:
            loading = {name for name in self.loads if name not in self.server.modules}
            assert len(self.server.modules) + len(loading) <= self.capacity

    # What requests do.

    @rule(served=st.sampled_from(NAMES), passed=st.sampled_from([0.0, 1.0, 5.0]))
    def acquire(self, served: str, passed: float) -> None:
        self.now += passed
        self.tickets += 1
        self.retired.discard(served)
        resident = self.slots.resident(served)
        failed = self.slots.failure(served, self.now) is not None
        error, retry_at = self.failures.get(served, (None, 0.0))
        due = error is not None and (retry_at is None or retry_at > self.now)
        assert failed == due
        self.waiting[self.tickets] = served
        self.obey(self.slots.acquire(self.tickets, served, self.now))
        assert (self.tickets in self.holders) == resident
        assert self.tickets in self.waiting or resident or due

    @precondition(lambda self: self.holders or self.waiting)
    @rule(pick=st.randoms(use_true_random=False))
    def release(self, pick: Random) -> None:
        ticket = pick.choice([*self.holders, *self.waiting])
        self.holders.pop(ticket, None)
        self.waiting.pop(ticket, None)
        self.obey(self.slots.release(ticket))
        assert self.slots.release(ticket) == []

    @precondition(lambda self: self.holders)
    @rule(pick=st.randoms(use_true_random=False))
    def forward(self, pick: Random) -> None:
        """Use a lease; the server answers 404 if it does not hold the module."""
        holder = pick.choice(list(self.holders.values()))
        if holder.module not in self.server.modules:
            self.obey(self.slots.lost(holder.served, holder.generation))

    @rule(served=st.sampled_from(NAMES))
    def late_404(self, served: str) -> None:
        known = self.slots.residents
        assert self.slots.lost(served, 0) == []
        assert self.slots.residents == known

    # What the server does.

    @precondition(lambda self: self.loads)
    @rule(pick=st.randoms(use_true_random=False), adopt=st.booleans())
    def load_works(self, pick: Random, adopt: bool) -> None:  # noqa: FBT001  # drawn by name
        served = pick.choice(self.loads)
        self.loads.remove(served)
        module = f"static-{served}" if adopt else served
        self.server.load(module)
        self.failures.pop(served, None)
        self.obey(self.slots.loaded(served, module if adopt else None))
        assert served not in self.waiting.values()

    @precondition(lambda self: self.loads)
    @rule(
        pick=st.randoms(use_true_random=False),
        retry_in=st.none() | st.sampled_from([0.0, 3.0]),
        untrue=st.booleans(),
    )
    def load_fails(self, pick: Random, retry_in: float | None, untrue: bool) -> None:  # noqa: FBT001  # drawn by name
        served = pick.choice(self.loads)
        self.loads.remove(served)
        if untrue and not self.alone:
            self.server.load(served)
        error = ProxyError("adapter_load_failed", f"{served} at {self.now}")
        retry_at = None if retry_in is None else self.now + retry_in
        self.failures[served] = (error, retry_at)
        self.retired.discard(served)
        self.obey(self.slots.load_failed(served, error, retry_at))
        assert served not in self.waiting.values()

    @precondition(lambda self: self.unloads)
    @rule(pick=st.randoms(use_true_random=False), untrue=st.booleans())
    def unload_ends(self, pick: Random, untrue: bool) -> None:  # noqa: FBT001  # drawn by name
        module = pick.choice(self.unloads)
        self.unloads.remove(module)
        if not untrue or self.alone:
            self.server.modules.pop(module, None)
        self.obey(self.slots.unloaded(module))

    @rule()
    def restart(self) -> None:
        self.server.modules.clear()
        self.restarted = True

    @precondition(lambda self: not self.alone)
    @rule(served=st.sampled_from(NAMES), there=st.booleans())
    def meddle(self, served: str, there: bool) -> None:  # noqa: FBT001  # drawn by name
        """Another proxy's load or unload."""
        if there:
            self.server.load(served)
        else:
            self.server.modules.pop(served, None)

    # Reconciling: the marker is taken, the server writes its list, the list arrives.

    @rule()
    def ask(self) -> None:
        listed = {module.removeprefix("static-"): module for module in self.server.modules}
        self.asked.append((self.slots.marker(), listed))

    @precondition(lambda self: self.asked)
    @rule(pick=st.randoms(use_true_random=False))
    def told(self, pick: Random) -> None:
        since, listed = self.asked.pop(pick.randrange(len(self.asked)))
        before = self.slots.residents
        commands = self.slots.reported(listed, since)
        # Learned: resident now, or already on its way out for somebody in the queue.
        going = {command.module for command in commands if isinstance(command, Unload)}
        for served, module in listed.items():
            if served not in before and (served in self.slots.residents or module in going):
                self.failures.pop(served, None)
                self.retired.discard(served)
        self.obey(commands)

    # What the operator does.

    @rule(served=st.sampled_from(NAMES))
    def retire(self, served: str) -> None:
        self.retired.add(served)
        self.pinned.discard(served)
        self.obey(self.slots.retire(served))

    @rule(served=st.sampled_from(NAMES), pin=st.booleans())
    def pin(self, served: str, pin: bool) -> None:  # noqa: FBT001  # drawn by name
        if pin:
            self.pinned.add(served)
            self.slots.pin(served)
        else:
            self.pinned.discard(served)
            self.obey(self.slots.unpin(served))

    @rule(age=st.sampled_from([0, 1]))
    def sweep(self, age: int) -> None:
        self.obey(self.slots.sweep(age))

    @rule(served=st.sampled_from(NAMES))
    def forgive(self, served: str) -> None:
        self.failures.pop(served, None)
        self.slots.forgive(served)

    # What always holds.

    @invariant()
    def the_books_agree(self) -> None:
        slots = self.slots
        assert slots.waiting == len(self.waiting)
        assert len(slots._leases) == len(self.holders)
        for served in NAMES:
            assert slots.loading(served) == (served in self.loads)
            current = slots._resident.get(served)
            using = [
                holder
                for holder in self.holders.values()
                if current is not None and holder.generation == current.generation
            ]
            assert slots.leases(served) == len(using)
            evictable = slots.resident(served) and not using and served not in self.pinned
            assert (served in slots._idle) == evictable

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        """A queue means that no slot is empty, or to be had, for its next name."""
        queued = set(self.waiting.values()) - set(self.loads)
        assert queued == set(self.slots._queue)
        startable = queued - set(self.slots._unloading.values())
        if startable:
            assert self.slots.free == 0
            assert not self.slots._idle or len(queued) <= self.slots._coming()

    def teardown(self) -> None:
        """Let everything end: all who wait are answered, and nothing is left behind."""
        if not hasattr(self, "slots"):
            return
        pick = Random(0)
        for served in tuple(self.pinned):
            self.pin(served, pin=False)
        while self.loads or self.unloads or self.holders:
            if self.loads:
                self.load_works(pick, adopt=False)
            elif self.unloads:
                self.unload_ends(pick, untrue=False)
            else:
                self.release(pick)
        assert self.waiting == {}
        assert left_behind(self.slots) == {}
        if self.alone:
            assert self.retired.isdisjoint(self.slots.residents)
            assert self.capacity is None or len(self.server.modules) <= self.capacity


Schedules.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSchedules = Schedules.TestCase
