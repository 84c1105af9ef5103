"""What a client's `model` means, and what the list of models shows."""

import pytest

from lora_proxy import catalog
from lora_proxy.catalog import Catalog
from lora_proxy.errors import ProxyError
from lora_proxy.types import Adapter, BaseModel

SQL = Adapter("sql", "/adapters/sql", aliases=("gpt-3.5-turbo", "coder"))
CHAT = Adapter("chat", "/adapters/chat")
SECRET = Adapter("sqlx", "/adapters/secret", aliases=("sqly",), hidden=True)
TINY = BaseModel("tiny", 1024)
BIG = BaseModel("big")


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
    assert "default_model 'nothing' is neither an adapter nor a base model" in error.message


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
