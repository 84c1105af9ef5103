"""What a client's `model` means, and what the list of models shows."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_proxy import catalog
from lora_proxy.catalog import Catalog, Servable
from lora_proxy.errors import ProxyError
from lora_proxy.types import Adapter, BaseModel, Route

SQL = Adapter("sql", "/adapters/sql", aliases=("gpt-3.5-turbo", "coder"))
CHAT = Adapter("chat", "/adapters/chat")
SECRET = Adapter("sqlx", "/adapters/secret", aliases=("sqly",), hidden=True)
TINY = BaseModel("tiny", 1024)
BIG = BaseModel("big")
CANARY = Route("support", (("sql", 90), ("chat", 10)), fallback=("tiny",))


def refusal(snapshot: Catalog, model: str | None) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        snapshot.resolve(model)
    return caught.value


# -- resolving ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("sql", SQL),
        ("gpt-3.5-turbo", SQL),
        ("coder", SQL),
        ("chat", CHAT),
        ("sqlx", SECRET),
        ("sqly", SECRET),
        ("tiny", TINY),
        ("big", BIG),
        (None, TINY),
        ("", TINY),
    ],
)
def test_every_public_name_resolves(model: str | None, target: Adapter | BaseModel) -> None:
    assert Catalog.build([SQL, CHAT, SECRET], [TINY, BIG]).resolve(model) == target


@pytest.mark.parametrize("model", [None, "", "unheard-of", "sql@0a1b2c3d"])
@pytest.mark.parametrize(
    ("default", "target"), [("chat", CHAT), ("coder", SQL), ("sqlx", SECRET), ("tiny", TINY)]
)
def test_the_default_stands_for_missing_and_unknown_names(
    model: str | None, default: str, target: Adapter | BaseModel
) -> None:
    snapshot = Catalog.build([SQL, CHAT, SECRET], [BIG, TINY], default)
    assert snapshot.resolve(model) == target
    assert snapshot.resolve("chat") == CHAT


def test_names_are_matched_exactly() -> None:
    snapshot = Catalog.build([SQL], [TINY])
    for model in ("SQL", " sql", "sql ", "Tiny", "sql/", "sq"):
        assert refusal(snapshot, model).code == "model_not_found"


def test_an_unknown_name_is_the_clients_fault_and_gets_the_closest_names() -> None:
    error = refusal(Catalog.build([SQL, CHAT], [TINY]), "sqll")
    assert (error.code, error.status, error.param) == ("model_not_found", 404, "model")
    assert error.message == (
        "model 'sqll' is not known; closest: 'sql'; every name: GET /v1/models"
    )


def test_nothing_is_suggested_where_nothing_is_close() -> None:
    error = refusal(Catalog.build([SQL], [TINY]), "zzzzzzzz")
    assert error.message == "model 'zzzzzzzz' is not known; every name: GET /v1/models"


def test_without_any_base_model_an_unknown_name_may_be_one_and_is_worth_another_try() -> None:
    error = refusal(Catalog.build([SQL]), "tiny")
    assert (error.code, error.status) == ("no_upstream", 503)
    assert "no upstream has named its base model yet" in error.message


@pytest.mark.parametrize("model", [None, ""])
def test_a_missing_name_needs_a_base_model(model: str | None) -> None:
    assert refusal(Catalog.build([SQL]), model).code == "no_upstream"


@pytest.mark.parametrize("model", [None, "unheard-of", "tiny"])
def test_a_default_that_no_upstream_has_named_yet_is_worth_waiting_for(model: str | None) -> None:
    error = refusal(Catalog.build([SQL], default_model="tiny"), model)
    assert error.code == "no_upstream"
    assert "default_model 'tiny'" in error.message


@pytest.mark.parametrize("model", [None, "unheard-of", "nothing"])
def test_a_default_that_stands_for_nothing_is_named(model: str | None) -> None:
    error = refusal(Catalog.build([SQL], [TINY], "nothing"), model)
    assert error.code == "model_not_found"
    assert "default_model 'nothing' is no adapter, route or base model" in error.message


# -- two meanings of one name -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (Adapter("sql", "/elsewhere"), "sql"),
        (Adapter("coder", "/elsewhere"), "coder"),
        (Adapter("other", "/o", aliases=("sql",)), "sql"),
        (Adapter("other", "/o", aliases=("coder",)), "coder"),
        (Adapter("other", "/o", aliases=("other",)), "other"),
    ],
)
def test_two_adapters_cannot_share_a_public_name(adapter: Adapter, name: str) -> None:
    with pytest.raises(ValueError, match=f"claim the public name '{name}'"):
        Catalog.build([SQL, CHAT, adapter])


def test_a_name_that_is_an_adapters_and_a_base_models_resolves_to_neither() -> None:
    snapshot = Catalog.build([SQL, CHAT], [BaseModel("sql"), BaseModel("coder")], "chat")
    error = refusal(snapshot, "sql")
    assert (error.code, error.param) == ("name_conflict", "model")
    assert snapshot.conflicts() == [refusal(snapshot, name).message for name in ("sql", "coder")]
    name, alias = snapshot.conflicts()
    assert name == (
        "adapter 'sql' has the name of base model 'sql'; rename the adapter, "
        "or start vLLM with another --served-model-name"
    )
    assert alias == (
        "adapter 'sql' has, as an alias, the name of base model 'coder'; remove the alias, "
        "or start vLLM with another --served-model-name"
    )


def test_a_conflict_leaves_the_other_names_alone() -> None:
    snapshot = Catalog.build([SQL, CHAT], [BaseModel("sql"), TINY])
    assert snapshot.resolve("coder") == SQL
    assert snapshot.resolve("chat") == CHAT
    assert snapshot.resolve("tiny") == TINY
    assert [entry["id"] for entry in snapshot.listing(0)] == [
        "tiny", "gpt-3.5-turbo", "coder", "chat",
    ]  # fmt: skip
    assert "'sql'" not in refusal(snapshot, "sqll").message


def test_a_default_in_conflict_is_no_way_round_it() -> None:
    snapshot = Catalog.build([SQL], [BaseModel("sql")], "sql")
    for model in (None, "", "unheard-of"):
        assert refusal(snapshot, model).code == "name_conflict"


# -- routes -------------------------------------------------------------------------------


def where(snapshot: Catalog, route: Route, key: bytes | None = None, draw: float = 0) -> list[str]:
    return [target.name for target in snapshot.pick(route, key, draw)]


def test_a_route_is_a_public_name() -> None:
    snapshot = Catalog.build([SQL, CHAT], [TINY], "support", [CANARY])
    for model in ("support", "unheard-of", None):
        assert snapshot.resolve(model) is CANARY
    assert snapshot.resolve("sql") == SQL


@pytest.mark.parametrize("name", ["sql", "coder", "canary"])
def test_a_route_cannot_share_its_name(name: str) -> None:
    routes = [replace(CANARY, name="canary"), replace(CANARY, name=name)]
    with pytest.raises(ValueError, match=f"claim the public name '{name}'"):
        Catalog.build([SQL, CHAT], routes=routes)


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        (0.0, ["sql", "tiny"]),
        (0.899, ["sql", "tiny"]),
        (0.9, ["chat", "tiny"]),
        (0.999999, ["chat", "tiny"]),
    ],
)
def test_a_split_gives_each_target_its_part_then_come_the_fallbacks(
    draw: float, names: list[str]
) -> None:
    assert where(Catalog.build([SQL, CHAT], [TINY], routes=[CANARY]), CANARY, None, draw) == names


def test_what_is_tried_once_is_not_tried_again_under_another_name() -> None:
    route = Route("r", (("coder", 1),), fallback=("sql", "gpt-3.5-turbo", "tiny", "chat", "tiny"))
    assert where(Catalog.build([SQL, CHAT], [TINY], routes=[route]), route) == [
        "sql", "tiny", "chat",
    ]  # fmt: skip


def test_a_base_model_that_no_upstream_serves_is_left_out() -> None:
    route = Route("r", (("big", 1),), fallback=("huge", "tiny", "sql"))
    snapshot = Catalog.build([SQL], [TINY], routes=[route])
    assert where(snapshot, route) == ["tiny", "sql"]
    assert where(snapshot.with_bases([TINY, BIG]), route) == ["big", "tiny", "sql"]


def test_a_route_of_which_nothing_is_left_says_what_it_leads_to() -> None:
    route = Route("r", (("big", 1),), fallback=("huge",))
    snapshot = Catalog.build([SQL], [TINY], routes=[route])
    with pytest.raises(ProxyError) as caught:
        snapshot.pick(route, None, 0)
    assert (caught.value.code, caught.value.replayable) == ("no_upstream", True)
    assert caught.value.message.startswith("route 'r' leads to 'big', 'huge', which no upstream")


def test_a_target_with_two_meanings_is_left_out_and_named_if_nothing_else_is_left() -> None:
    route = Route("r", (("sql", 1),), fallback=("chat",))
    snapshot = Catalog.build([SQL, CHAT], [BaseModel("sql")], routes=[route])
    assert where(snapshot, route) == ["chat"]
    with pytest.raises(ProxyError, match="adapter 'sql' has the name of base model 'sql'"):
        snapshot.pick(replace(route, fallback=()), None, 0)


def test_a_route_leads_to_no_other_route() -> None:
    circle = Route("circle", (("circle", 1),), fallback=("support",), mirror="support", sample=1)
    snapshot = Catalog.build([SQL, CHAT], [TINY], routes=[circle, CANARY])
    with pytest.raises(ProxyError, match="route 'circle' leads to 'circle', 'support'"):
        snapshot.pick(circle, None, 0)
    assert snapshot.mirror_of(circle, 0) is None


WEIGHTS = st.lists(
    st.one_of(st.integers(1, 100), st.floats(0.01, 100)), min_size=1, max_size=5
).map(tuple)


def fleet_of(weights: tuple[float, ...]) -> tuple[Catalog, Route]:
    """A route over one adapter for each weight, which are called a0, a1 and so on."""
    adapters = [Adapter(f"a{n}", f"/{n}") for n in range(len(weights))]
    route = Route("r", tuple((f"a{n}", weight) for n, weight in enumerate(weights)))
    return Catalog.build(adapters, routes=[route]), route


@given(WEIGHTS, st.integers(0, 2**32))
def test_draws_and_keys_are_split_by_the_weights(weights: tuple[float, ...], seed: int) -> None:
    snapshot, route = fleet_of(weights)
    chance = Random(seed)
    drawn = [where(snapshot, route, None, n / 2000)[0] for n in range(2000)]
    keyed = [where(snapshot, route, chance.randbytes(8))[0] for _ in range(2000)]
    for n, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(drawn.count(f"a{n}") - 2000 * share) <= 2  # an interval's two ends
        # Eight standard deviations of 2000 throws, 22 each at most: never by chance.
        assert abs(keyed.count(f"a{n}") - 2000 * share) < 180


@given(WEIGHTS, st.binary(max_size=40), st.floats(0, 1, exclude_max=True))
def test_a_key_keeps_its_target_whatever_is_drawn(
    weights: tuple[float, ...], key: bytes, draw: float
) -> None:
    snapshot, route = fleet_of(weights)
    again, same = fleet_of(weights)
    assert where(snapshot, route, key, draw) == where(again, same, key, 0)


@given(
    st.integers(1, 99),
    st.integers(1, 99),
    st.lists(st.binary(max_size=20), min_size=50, max_size=50),
)
def test_new_weights_move_only_keys_towards_what_has_more(
    before: int, after: int, keys: list[bytes]
) -> None:
    snapshot, old = fleet_of((before, 100 - before))
    _, new = fleet_of((after, 100 - after))
    for key in keys:
        was, now = where(snapshot, old, key), where(snapshot, new, key)
        assert now in (was, ["a0"] if after > before else ["a1"])


def test_keys_move_by_the_share_that_the_weights_did() -> None:
    snapshot, old = fleet_of((90, 10))
    _, new = fleet_of((80, 20))
    keys = [b"user-%d" % n for n in range(10_000)]
    moved = sum(where(snapshot, old, key) != where(snapshot, new, key) for key in keys)
    assert 880 < moved < 1120  # a tenth, and four standard deviations


def test_the_choices_of_two_routes_have_nothing_to_do_with_each_other() -> None:
    snapshot, one = fleet_of((1, 1))
    other = replace(one, name="other")
    keys = [b"user-%d" % n for n in range(10_000)]
    alike = sum(where(snapshot, one, key) == where(snapshot, other, key) for key in keys)
    assert 4800 < alike < 5200


def test_a_keys_choice_is_the_same_in_every_process() -> None:
    snapshot, route = fleet_of((1, 1, 1, 1))
    keys = (b"", b"alice", b"bob", b"carol", b"\xff\0")
    assert [where(snapshot, route, key)[0] for key in keys] == ["a2", "a3", "a3", "a1", "a1"]


@pytest.mark.parametrize(
    ("mirror", "target"),
    [("coder", SQL), ("tiny", TINY), ("big", None), (None, None)],
)
def test_a_mirror_gets_its_sample(mirror: str | None, target: Servable | None) -> None:
    route = replace(CANARY, mirror=mirror, sample=0.25 if mirror else 0)
    snapshot = Catalog.build([SQL, CHAT], [TINY], routes=[route])
    assert snapshot.mirror_of(route, 0) == target
    assert snapshot.mirror_of(route, 0.2499) == target
    assert snapshot.mirror_of(route, 0.25) is None
    assert snapshot.mirror_of(replace(route, sample=0), 0) is None
    assert snapshot.mirror_of(replace(route, sample=1), 0.999999) == target


def test_a_route_with_a_base_models_name_is_a_conflict() -> None:
    snapshot = Catalog.build([SQL, CHAT], [BaseModel("support")], routes=[CANARY])
    assert snapshot.conflicts() == [refusal(snapshot, "support").message]
    assert snapshot.conflicts()[0].startswith(
        "route 'support' has the name of base model 'support'; rename the route, or start"
    )


def test_routes_are_listed_after_the_adapters_unless_they_are_hidden() -> None:
    hidden = replace(CANARY, name="hidden", hidden=True)
    snapshot = Catalog.build([CHAT], [TINY], routes=[CANARY, hidden])
    assert [entry["id"] for entry in snapshot.listing(0)] == ["tiny", "chat", "support"]
    assert snapshot.listing(7)[-1] == {
        "id": "support", "object": "model", "created": 7, "owned_by": "lora-proxy",
        "root": "support", "parent": "tiny", "max_model_len": 1024,
    }  # fmt: skip
    entry = snapshot.entry("hidden", 0)
    assert entry is not None
    assert entry["root"] == "hidden"
    entry = snapshot.with_bases([TINY, BIG]).entry("support", 0)
    assert entry is not None
    assert entry["parent"] is None
    assert "closest: 'support'" in refusal(snapshot, "suport").message
    assert "hidden" not in refusal(snapshot, "hiden").message


# -- snapshots ----------------------------------------------------------------------------


def test_new_base_models_make_a_new_snapshot_and_leave_the_old_one() -> None:
    before = Catalog.build([SQL], default_model="sql")
    after = before.with_bases([TINY])
    assert before.bases == ()
    assert after.bases == (TINY,)
    assert after.adapters == before.adapters == (SQL,)
    assert after.resolve("tiny") == TINY
    assert before.resolve("tiny") == SQL
    assert after.with_bases([]).resolve("tiny") == SQL


def test_new_adapters_make_a_new_snapshot_with_everything_else() -> None:
    before = Catalog.build([SQL, CHAT], [TINY], "support", [CANARY])
    changed = replace(CHAT, path="/adapters/chat-2")
    after = before.with_adapters([changed, SECRET])
    assert (before.adapters, after.adapters) == ((SQL, CHAT), (changed, SECRET))
    assert (before.resolve("chat"), after.resolve("chat")) == (CHAT, changed)
    assert after.bases == (TINY,)
    assert after.resolve("sql") is CANARY  # unknown now, so the default
    assert where(after, CANARY) == ["tiny"]
    with pytest.raises(ValueError, match="claim the public name 'support'"):
        before.with_adapters([Adapter("support", "/s")])


def test_an_adapter_is_found_by_its_own_name_only() -> None:
    snapshot = Catalog.build([SQL, SECRET], [BaseModel("sql")], routes=[CANARY])
    assert snapshot.adapter("sql") is SQL  # although clients do not reach it
    assert snapshot.adapter("sqlx") is SECRET
    for name in ("coder", "support", "unheard-of"):
        assert snapshot.adapter(name) is None


def test_the_same_base_models_make_the_same_snapshot() -> None:
    snapshot = Catalog.build([SQL], [TINY, BIG])
    assert snapshot.with_bases([BIG, TINY, TINY]) is snapshot
    assert snapshot.with_bases([BIG, BaseModel("tiny", 512)]) is not snapshot


def test_replicas_of_one_base_model_promise_the_shortest_context() -> None:
    reported = [BaseModel("tiny"), BaseModel("tiny", 2048), BaseModel("tiny", 1024), BIG]
    assert Catalog.build([], reported).bases == (TINY, BIG)


# -- GET /v1/models -----------------------------------------------------------------------


def test_the_listing_has_openais_shape_and_no_paths() -> None:
    common = {"object": "model", "created": 1700000000, "owned_by": "lora-proxy"}
    assert Catalog.build([SQL, SECRET], [TINY]).listing(1700000000) == [
        {"id": "tiny", **common, "root": "tiny", "parent": None, "max_model_len": 1024},
        {"id": "sql", **common, "root": "sql", "parent": "tiny", "max_model_len": 1024},
        {"id": "gpt-3.5-turbo", **common, "root": "sql", "parent": "tiny", "max_model_len": 1024},
        {"id": "coder", **common, "root": "sql", "parent": "tiny", "max_model_len": 1024},
    ]


@pytest.mark.parametrize("bases", [[], [TINY, BIG]])
def test_a_parent_is_named_only_where_there_is_one_base_model(bases: list[BaseModel]) -> None:
    entry = Catalog.build([CHAT], bases).entry("chat", 0)
    assert entry is not None
    assert entry["parent"] is None
    assert "max_model_len" not in entry


def test_the_parent_is_the_base_model_that_the_adapter_declares() -> None:
    adapters = [replace(CHAT, base="big"), replace(SQL, base="not-served")]
    snapshot = Catalog.build(adapters, [TINY, BIG])
    parents = {entry["id"]: entry["parent"] for entry in snapshot.listing(0)}
    assert (parents["chat"], parents["sql"]) == ("big", None)


def test_an_entry_is_the_listings_and_hidden_ones_answer_too() -> None:
    snapshot = Catalog.build([SQL, SECRET], [TINY])
    listed = snapshot.listing(5)
    assert [snapshot.entry(str(entry["id"]), 5) for entry in listed] == listed
    hidden = snapshot.entry("sqly", 5)
    assert hidden is not None
    assert (hidden["id"], hidden["root"]) == ("sqly", "sqlx")
    assert snapshot.entry("unheard-of", 5) is None
    assert snapshot.entry("", 5) is None


# -- the closest names ------------------------------------------------------------------------


@pytest.mark.parametrize("slip", ["sqk", "sq", "sqll", "xsql", "SQL", "slq", "ssql"])
def test_a_slip_of_the_keyboard_finds_the_name(slip: str) -> None:
    assert "closest: 'sql'" in refusal(Catalog.build([SQL, CHAT], [TINY]), slip).message


@pytest.mark.parametrize("slip", ["sqlx0", "sqlz", "sqlxy", "sqly1"])
def test_hidden_names_are_never_suggested(slip: str) -> None:
    message = refusal(Catalog.build([SQL, SECRET], [TINY]), slip).message
    assert "'sqlx'" not in message
    assert "'sqly'" not in message


@pytest.mark.parametrize("slip", ["customer-0471x-sql", "xustomer-04711-sql", "customer-04711-sqk"])
def test_among_10000_names_the_comparisons_are_few(
    slip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = (Adapter(f"customer-{n:05d}-sql", "/p") for n in range(10_000))
    snapshot = Catalog.build(adapters, [TINY])
    compared: list[str] = []
    likeness = catalog._likeness

    def counting(a: str, b: str) -> float:
        compared.append(b)
        return likeness(a, b)

    monkeypatch.setattr(catalog, "_likeness", counting)
    message = refusal(snapshot, slip).message
    assert "closest: 'customer-0471" in message
    assert 0 < len(compared) <= 4 * catalog.NEIGHBOURS


def test_a_huge_name_is_neither_compared_nor_repeated_whole() -> None:
    snapshot = Catalog.build([Adapter("a" * 5000, "/a"), SQL], [TINY])
    message = refusal(snapshot, "a" * 1_000_000).message
    shown = "a" * catalog.NAME_SHOWN + "…"
    assert message.startswith(f"model '{shown}' is not known; closest: '{shown}'")
    assert len(message) < 300


def test_a_name_cannot_smuggle_control_characters_into_a_message() -> None:
    message = refusal(Catalog.build([SQL], [TINY]), "a\r\nb\x1b[2J\ud800\0").message
    assert r"'a\r\nb\x1b[2J\ud800\x00'" in message
    assert message.isprintable()
    message.encode()
