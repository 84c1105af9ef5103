"""What was written, where it stands, and in which order its faults are told."""

import pytest

from lora_proxy.draft import Draft, Key, dotted, parse


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (("limits", "body"), "limits.body"),
        (("adapters", 1, "aliases", 0), "adapters[1].aliases[0]"),
        (("a\nb",), r"'a\nb'"),
        ((), ""),
    ],
)
def test_a_key_is_written_on_one_line(key: Key, text: str) -> None:
    assert dotted(key) == text


def test_a_text_becomes_a_value_and_every_key_knows_its_line() -> None:
    draft = Draft()
    value = parse(draft, b"a: 1e-2\nb:\n  - c: x\n  - d: y\n", (), "f.yaml")
    assert value == {"a": 0.01, "b": [{"c": "x"}, {"d": "y"}]}
    assert {key: where for key, (_, where) in draft.origins.items()} == {
        ("a",): "f.yaml, line 1",
        ("b",): "f.yaml, line 2",
        ("b", 0): "f.yaml, line 3",
        ("b", 0, "c"): "f.yaml, line 3",
        ("b", 1): "f.yaml, line 4",
        ("b", 1, "d"): "f.yaml, line 4",
    }


def test_a_text_may_be_the_value_of_one_key() -> None:
    draft = Draft()
    assert parse(draft, b"- {x: 1, x: 2}", ("list",), "f.json") == [{"x": 2}]
    assert draft.report() == ["list[0].x: already given in line 1; keep one (f.json, line 1)"]


@pytest.mark.parametrize("text", [b"", b"# nothing", b"---"])
def test_a_text_that_holds_nothing_is_no_fault(text: bytes) -> None:
    assert parse(Draft(), text, (), "f.yaml") is None


def test_a_text_that_is_no_yaml_is_not_quoted() -> None:
    with pytest.raises(ValueError, match="line 1, column 6: found undefined alias") as caught:
        parse(Draft(), b"key: *hunter2", (), "f.yaml")
    assert "hunter2" not in str(caught.value)


def test_faults_of_the_file_come_first_in_its_order_and_none_twice() -> None:
    draft = Draft()
    draft.tree = {"a": 1, "b": {"c": 2}}
    parse(draft, b"a: 1\nb: {c: 2}\n", (), "f.yaml")
    draft.put(("d",), 3, "--d")
    draft.fault(("d",), "wrong")
    draft.fault_elsewhere("LORA_PROXY_E: wrong")
    draft.fault(("b", "c", "deeper"), "wrong")
    draft.fault(("a",), "wrong")
    draft.fault(("a",), "wrong")
    assert draft.report() == [
        "a: wrong (f.yaml, line 1)",
        "b.c.deeper: wrong (f.yaml, line 2)",
        "d: wrong (--d)",
        "LORA_PROXY_E: wrong",
    ]


def test_what_is_put_makes_room_for_itself_and_takes_the_place_of_what_was_there() -> None:
    draft = Draft()
    draft.put(("list", 0, "x"), 1, "one")
    draft.put(("list", 1), {"x": 2}, "two")
    draft.put(("list", 0, "x"), 3, "three")
    assert draft.tree == {"list": [{"x": 3}, {"x": 2}]}
    draft.fault(("list", 0, "x"), "wrong")
    draft.fault(("list", 1, "x"), "wrong")
    draft.put(("list", 3), {}, "four")
    assert draft.report() == [
        "list[0].x: wrong (three)",
        "list[1].x: wrong (two)",
        "list: there are 2 entries; number them from 0 without gaps (four)",
    ]


def test_a_section_is_found_wherever_it_stands() -> None:
    draft = Draft({"list": [{"tls": {"a": 1}}, "text", {"tls": None}, {"tls": {"b": 2}}]})
    assert draft.mappings(("list", "*", "tls")) == [
        (("list", 0, "tls"), {"a": 1}),
        (("list", 3, "tls"), {"b": 2}),
    ]
    assert draft.mappings(("absent", "*")) == []
