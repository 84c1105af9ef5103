"""Rewriting: tables for what is decided, properties for what must hold for any bytes."""

import itertools
import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_proxy.errors import ProxyError
from lora_proxy.rewrite import (
    Restorer,
    client_headers,
    peek,
    restore_text,
    unnamed,
    upstream_headers,
    without_template,
    write,
)
from lora_proxy.types import Headers

SERVED = "sql@1a2b3c4d"

# A busy machine is not a failure.
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def rewrite(body: bytes, model: str, **fields: dict[str, object]) -> bytes:
    return write(peek(body), body, model, **fields)


# Reading requests


@pytest.mark.parametrize(
    ("body", "model", "stream"),
    [
        (b'{"model":"sql"}', "sql", False),
        (b' \n{ "model" : "sql" , "stream" : true }\t', "sql", True),
        (b'{"m\\u006fdel":"\\u0073ql"}', "sql", False),
        (b'{"model":"a","model":"b"}', "b", False),
        (b'{"model":"a","mod\\u0065l":"b"}', "b", False),
        (b'{"model":"a","stream":true,"stream":false}', "a", False),
        (b'{"x":{"model":"a","stream":true}}', None, False),
        (b'{"model":""}', None, False),
        (b'{"model":null}', None, False),
        (b"{}", None, False),
        (b'{"stream":1}', None, False),
        (b'{"stream":"true"}', None, False),
        ('{"model":"größe/日本"}'.encode(), "größe/日本", False),
    ],
)
def test_peek(body: bytes, model: str | None, stream: bool) -> None:  # noqa: FBT001 a table
    peeked = peek(body)
    assert (peeked.model, peeked.stream) == (model, stream)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b'"model"',
        b'[{"model":"sql"}]',
        b"model=sql",
        b'{"model":"sql"',
        b'{"model":"sql"} x',
        b'{"model":"sql"}{"model":"base"}',
        b'{"model":"sql",}',
        b"{'model':'sql'}",
        b'{model:"sql"}',
        b'\xef\xbb\xbf{"model":"sql"}',
        '{"model":"sql"}'.encode("utf-16"),
        b'{"model":"sql","x":"\xff"}',
        b'{"model":"\xff"}',
        b'{"\xff":1}',
        b'{"x":["\xed\xa0\x80"]}',  # a surrogate on its own
        b'{"temperature":NaN}',
        b'{"temperature":-Infinity}',
        b'{"n":01}',
        b'{"x":"\n"}',
        b'{"model":"sql"}\x00',
        b'{"x":' + b"[" * 1_000_000,
        b'{"x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b'{"x":' * 1_000_000 + b"1" + b"}" * 1_000_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_peek_refuses_what_is_not_a_json_object(body: bytes) -> None:
    with pytest.raises(ProxyError) as caught:
        peek(body)
    assert (caught.value.code, caught.value.status) == ("invalid_json", 400)


@pytest.mark.parametrize("value", ["1", "1e2", "true", "[]", '["sql"]', "{}"])
def test_peek_refuses_a_model_that_is_no_string(value: str) -> None:
    with pytest.raises(ProxyError) as caught:
        peek(b'{"model":%b}' % value.encode())
    assert (caught.value.code, caught.value.param) == ("invalid_model", "model")


# Writing requests


@pytest.mark.parametrize(
    ("body", "written"),
    [
        (b'{"model":"sql"}', b'{"model":"served"}'),
        (b'{"a":1,"model":"sql","b":2}', b'{"a":1,"model":"served","b":2}'),
        (b'{"a":1}', b'{"model":"served","a":1}'),
        (b'{"a":1,"model":null}', b'{"a":1,"model":"served"}'),
        (b"{}", b'{"model":"served"}'),
        (b'{"model":"a","x":0,"model":"b"}', b'{"model":"served","x":0}'),
        (b'{"x":0,"m\\u006fdel":"a","model":"b"}', b'{"x":0,"model":"served"}'),
        (b'{"x":{"model":"sql"}}', b'{"model":"served","x":{"model":"sql"}}'),
        (b'{"a\\"b":1,"\\u00e9":2}', '{"model":"served","a\\"b":1,"é":2}'.encode()),
    ],
)
def test_write_puts_the_model_where_it_stood_or_first(body: bytes, written: bytes) -> None:
    assert rewrite(body, "served") == written


def test_write_keeps_the_spelling_of_every_other_value() -> None:
    values = [
        b"1e2",
        b"-0",
        b"1.50",
        b"12345678901234567890123",
        b"1E+400",
        b'"\\u0041\\/\\ud83d\\ude00"',
        b'{ "k" : 1, "k" : 2,\t"model":"sql" }',
        b"[ 1 ,\n2 ]",
    ]
    body = b"{%b}" % b" ,\n".join(b'"v%d" : %b' % item for item in enumerate(values))
    written = rewrite(body, "served")
    assert written == b'{"model":"served",%b}' % b",".join(
        b'"v%d":%b' % item for item in enumerate(values)
    )


def test_write_fills_defaults_and_forces_overrides() -> None:
    body = b'{"model":"sql","temperature":0.10,"top_p":null,"n":1}'
    written = rewrite(
        body,
        "served",
        defaults={"temperature": 0.95, "top_p": 0.7, "stop": ["é"]},
        overrides={"n": 2, "seed": None},
    )
    assert written == (
        '{"model":"served","temperature":0.10,"top_p":0.7,"n":2,"stop":["é"],"seed":null}'.encode()
    )


def test_write_lets_no_default_or_override_touch_the_model() -> None:
    forged: dict[str, object] = {"model": "other"}
    for body in (b'{"model":"sql"}', b"{}"):
        written = rewrite(body, "served", defaults=forged, overrides=forged)
        assert written == b'{"model":"served"}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"sql","n":1}',
        b' {"n" : 1,\r\n "model" : "sql" } ',
        b'{"model":"sql","messages":[{"content":"say \\"model\\": \\"x\\""}]}',
        b'{"model":"sql","nested":{"model":"x"}}',  # compact: nothing can hide
        b'{"model":"sql","prompt":"caf\\u00e9"}',
        json.dumps({"model": "sql", **{f"field-{n}": n for n in range(20)}}).encode(),
    ],
)
def test_write_leaves_a_body_alone_when_nothing_changes(body: bytes) -> None:
    assert rewrite(body, "sql") is body
    assert rewrite(body, "sql", defaults={"model": "x"}) is body


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"other","model":"sql"}',
        b'{"model":1,"model":"sql"}',
        b'{"mod\\u0065l":"other","model":"sql"}',
        b'{"model":"other","\\u006dodel":"sql"}',
        b'{"\\u006d\\u006f\\u0064\\u0065\\u006c":"other","model":"sql"}',
    ],
)
def test_write_collapses_duplicates_even_when_the_name_stays(body: bytes) -> None:
    assert rewrite(body, "sql") == b'{"model":"sql"}'


def test_write_does_not_take_a_default_for_a_change() -> None:
    body = b'{"model":"sql","temperature":1}'
    assert rewrite(body, "sql", defaults={"temperature": 0.5}) is body
    assert rewrite(body, "sql", overrides={"temperature": 1}) == body


blanks = st.text(" \t\r\n", max_size=3)
numbers = st.sampled_from(["0", "-0", "1e2", "1E-07", "1.50", "9" * 40, "0.1e+3"])
strings = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(json.dumps),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(
        lambda text: json.dumps(text, ensure_ascii=False)
    ),
    st.sampled_from(['"\\u0041"', '"\\/"', '"\\"model\\":\\"sql\\""', '"model"']),
)


def arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(st.lists(values, max_size=3), blanks).map(
        lambda parts: f"[{parts[1]}{(parts[1] + ',').join(parts[0])}]"
    )


def members(
    keys: st.SearchStrategy[str], values: st.SearchStrategy[str]
) -> st.SearchStrategy[tuple[str, str, str]]:
    """(key as spelled, value as spelled, the whole member with blanks around)."""
    return st.tuples(keys, values, blanks, blanks).map(
        lambda m: (m[0], m[1], f"{m[2]}{m[0]}{m[3]}:{m[3]}{m[1]}{m[2]}")
    )


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    keys = st.sampled_from(['"k"', '"\\u006b"', '"model"', '"é"'])  # duplicates wanted
    return st.lists(members(keys, values), max_size=4).map(
        lambda listed: "{" + ",".join(whole for _, _, whole in listed) + "}"
    )


raw_values = st.recursive(
    st.one_of(numbers, strings, st.sampled_from(["null", "true", "false"])),
    lambda inner: st.one_of(arrays(inner), objects(inner)),
    max_leaves=8,
)
raw_keys = st.one_of(strings, st.sampled_from(['"model"', '"mod\\u0065l"', '"temperature"', '"n"']))


@FUZZ
@given(st.lists(members(raw_keys, raw_values), max_size=8), st.sampled_from(["sql", "p/é\"'"]))
def test_write_round_trips_every_other_key_byte_for_byte(
    listed: list[tuple[str, str, str]], model: str
) -> None:
    """Python's json, which vLLM reads with, sees the new model, and all else spelled alike."""
    members_ = [m for m in listed if json.loads(m[0]) != "model"]
    body = ("{" + ",".join([m[2] for m in members_] + ['"model":"x"']) + "}").encode()
    last = {json.loads(key): value for key, value, _ in members_}

    written = rewrite(body, model)

    fields = msgspec.json.decode(written, type=dict[str, msgspec.Raw])
    assert json.loads(bytes(fields.pop("model"))) == model
    assert {key: bytes(raw).decode() for key, raw in fields.items()} == last
    assert list(fields) == list(last)
    assert json.loads(written)["model"] == model


@FUZZ
@given(st.lists(members(raw_keys, raw_values), max_size=8), st.sampled_from(["sql", "model"]))
def test_no_reader_finds_another_model_than_the_one_written(
    listed: list[tuple[str, str, str]], model: str
) -> None:
    """Also where the body goes on as it is: one top-level `model`, whatever stood there."""
    named = [m for m in listed if json.loads(m[0]) == "model"]
    body = ("{" + ",".join([m[2] for m in listed] + [f'"model":"{model}"']) + "}").encode()

    written = rewrite(body, model)

    pairs = json.loads(written, object_pairs_hook=list)
    assert [value for key, value in pairs if key == "model"] == [model]
    if written is body:
        assert named == []


# Names in answers

NAMES = [
    (SERVED, "sql"),
    ("a", "a-much-longer-public-name"),
    ("model", "gpt"),  # a name that makes the pattern overlap itself by more than a quote
    (":", "model"),
    ("org/a b@00000000", 'quo"ted\\'),
    ("größe@日本", "ü"),
    ("m" * 100, ""),
]
names = st.sampled_from(NAMES)


def patterns(name: str) -> list[bytes]:
    spelled = {json.dumps(name, ensure_ascii=ascii_only).encode() for ascii_only in (False, True)}
    return [b'"model":' + space + s for s in sorted(spelled) for space in (b"", b" ")]


def one_scan(data: bytes, served: str, public: str) -> bytes:
    """What the whole must become: each match from left to right, its value exchanged."""
    utf8 = json.dumps(served, ensure_ascii=False).encode()

    def swap(match: re.Match[bytes]) -> bytes:
        ascii_only = not match[0].endswith(utf8)
        value = json.dumps(public, ensure_ascii=ascii_only).encode()
        return match[0][: match[0].index(b":") + 1] + b" " * (b": " in match[0][:9]) + value

    return re.sub(b"|".join(map(re.escape, patterns(served))), swap, data)


def fed(restorer: Restorer, chunks: list[bytes]) -> bytes:
    return b"".join(map(restorer.feed, chunks)) + restorer.flush()


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@st.composite
def fragments(draw: st.DrawFn, served: str, public: str) -> bytes:
    """Bytes in which whole, cut and overlapping patterns are common."""
    sources = patterns(served) + patterns(public)
    whole = st.sampled_from(sources)
    # without its first quote a pattern can only match where it may not: on a consumed one
    tail = whole.map(lambda pattern: pattern[1:])
    edge = st.integers(0, 120)
    head = st.tuples(whole, edge).map(lambda t: t[0][: t[1]])
    part = st.tuples(whole, edge, edge).map(lambda t: t[0][t[1] : t[2]])
    other = st.one_of(
        st.binary(max_size=4),
        st.sampled_from([b'"', b'"model"', b'"model":', b"\n", b"}", b"\n\n"]),
    )
    return b"".join(draw(st.lists(st.one_of(whole, tail, part, head, other), max_size=12)))


@FUZZ
@given(names, st.data())
def test_any_chunking_of_any_bytes_gives_what_one_scan_gives(
    pair: tuple[str, str], data: st.DataObject
) -> None:
    served, public = pair
    whole = data.draw(fragments(served, public))
    chunks = cut(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    assert fed(Restorer(served, public), chunks) == one_scan(whole, served, public)


@FUZZ
@given(names, st.data())
def test_any_bytes_one_by_one(pair: tuple[str, str], data: st.DataObject) -> None:
    served, public = pair
    whole = data.draw(fragments(served, public))
    restorer = Restorer(served, public)
    longest = max(map(len, patterns(served)))
    out = b""
    for index in range(len(whole)):
        out += restorer.feed(whole[index : index + 1])
        assert len(restorer._held) < longest
        # What is held back begins a pattern: nothing else waits for the next read.
        assert any(p.startswith(restorer._held) for p in patterns(served))
    assert out + restorer.flush() == one_scan(whole, served, public)
    assert restorer.flush() == b""


@pytest.mark.parametrize(("served", "public"), NAMES)
def test_overlapping_matches_share_no_quote(served: str, public: str) -> None:
    for first in patterns(served):
        for second in patterns(served):
            whole = first + second[1:] + second
            for at in range(len(whole)):
                chunks = [whole[:at], whole[at:]]
                assert fed(Restorer(served, public), chunks) == one_scan(whole, served, public)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
pattern_texts = st.sampled_from(
    [
        f'"model":"{SERVED}"',
        f'{{"model": "{SERVED}"}}',
        f'\\"model":"{SERVED}"',
        f'model":"{SERVED}"',
        f'"model":"{SERVED}',
        "model",
        SERVED,
        "\\",
        '"',
    ]
)
spoken = st.lists(st.one_of(texts, pattern_texts), max_size=4).map("".join)
documents = st.recursive(
    st.one_of(spoken, st.none(), st.integers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(spoken, st.just("model")), inner, max_size=4),
    ),
    max_leaves=12,
)


def restored(value: Any) -> Any:
    """The same document with the public name where a `model` key has the served one."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if isinstance(value, dict):
        return {
            key: "sql" if (key, item) == ("model", SERVED) else restored(item)
            for key, item in value.items()
        }
    return value


@FUZZ
@given(
    st.lists(documents, min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": ")]),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_text_that_a_model_wrote_is_never_touched(
    listed: list[object],
    ascii_only: bool,  # noqa: FBT001 drawn by Hypothesis
    separators: tuple[str, str],
    cuts: list[int],
) -> None:
    """Whole documents and streams of them: only values of `model` keys change."""

    def events(values: list[object]) -> bytes:
        dumped = (json.dumps(v, ensure_ascii=ascii_only, separators=separators) for v in values)
        return "".join(f"event: x\ndata: {text}\n\n" for text in dumped).encode()

    whole = events(listed)
    expected = events([restored(value) for value in listed])
    assert fed(Restorer(SERVED, "sql"), cut(whole, cuts)) == expected


STREAMS = {
    "chat": (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%b",'
        b'"choices":[{"index":0,"delta":{"content":"say \\"model\\":\\"sql@1a2b3c4d\\""}}]}\n\n'
        b'data: {"id":"chatcmpl-1","model":"%b","choices":[],"usage":{"total_tokens":3}}\n\n'
        b"data: [DONE]\n\n"
    ),
    "completions": (
        b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"%b",'
        b'"choices":[{"index":0,"text":" sql@1a2b3c4d","finish_reason":"stop"}]}\n\n'
        b'data: {"id":"cmpl-1","object":"text_completion","model":"%b","choices":[]}\n\n'
        b"data: [DONE]\n\n"
    ),
    "responses": (
        b'event: response.created\ndata: {"response":{"id":"resp_1","model":"%b","output":[]},'
        b'"sequence_number":0,"type":"response.created"}\n\n'
        b'event: response.output_text.delta\ndata: {"delta":"sql@1a2b3c4d","type":'
        b'"response.output_text.delta"}\n\n'
        b'event: response.completed\ndata: {"response":{"id":"resp_1","model":"%b"},"type":'
        b'"response.completed"}\n\n'
    ),
    "messages": (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","role":'
        b'"assistant","content":[],"model":"%b","usage":{"input_tokens":1}}}\n\n'
        b'event: content_block_delta\ndata: {"index":0,"delta":{"type":"text_delta","text":'
        b'"sql@1a2b3c4d"},"type":"content_block_delta"}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","model": "%b"}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    ),
    "body": b'{"id":"chatcmpl-1","model":"%b","choices":[{"message":{"model":"%b"}}]}',
}


@pytest.mark.parametrize("shape", STREAMS)
def test_every_api_shape_cut_anywhere(shape: str) -> None:
    whole = STREAMS[shape] % (SERVED.encode(), SERVED.encode())
    expected = STREAMS[shape] % (b"sql", b"sql")
    for at in range(len(whole)):
        assert fed(Restorer(SERVED, "sql"), [whole[:at], whole[at:]]) == expected
    assert fed(Restorer(SERVED, "sql"), [bytes([byte]) for byte in whole]) == expected


@pytest.mark.parametrize("shape", STREAMS)
def test_a_whole_event_is_never_held_back(shape: str) -> None:
    restorer = Restorer(SERVED, "sql")
    for event in (STREAMS[shape] % (SERVED.encode(), SERVED.encode())).split(b"\n\n"):
        restorer.feed(event + b"\n\n" if shape != "body" else event)
        assert restorer.flush() == b""


def test_a_stream_cut_short_gives_up_what_was_held() -> None:
    restorer = Restorer(SERVED, "sql")
    assert restorer.feed(b'data: {"model":"sql@1a') == b"data: {"
    assert restorer.flush() == b'"model":"sql@1a'


def test_equal_names_pass_the_same_objects_through() -> None:
    restorer = Restorer("base", "base")
    chunk = b'data: {"model":"ba'
    assert restorer.feed(chunk) is chunk
    assert restorer.flush() == b""


def test_a_chunk_without_the_name_is_not_copied() -> None:
    chunk = b'data: {"model":"tiny","choices":[]}\n\n'
    assert Restorer(SERVED, "sql").feed(chunk) is chunk


@pytest.mark.parametrize("served", ["", 'a"b', "a\\b", "a\nb", "\x00", "\ud800"])
def test_a_served_name_that_json_escapes_is_refused(served: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be a served name|surrogates not allowed"):
        Restorer(served, "sql")


# Names in error answers


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("The model `sql@1` does not exist.", "The model `p` does not exist."),
        ('{"error":{"message":"sql@1: no"}}', '{"error":{"message":"p: no"}}'),
        ("sql@1", "p"),
        (r'{"message":"x\nsql@1\tsql@1\\n"}', r'{"message":"x\np\tp\\n"}'),
        ("'sql@1', 'sql@12', 'xsql@1', 'my-sql@1'", "'p', 'sql@12', 'xsql@1', 'my-sql@1'"),
        ("No adapter found for /adapters/sql@1", "No adapter found for /adapters/sql@1"),
    ],
)
def test_restore_text(body: str, expected: str) -> None:
    assert restore_text(body.encode(), "sql@1", "p") == expected.encode()


def test_restore_text_leaves_the_shape_of_an_error_alone() -> None:
    body = b'{"error":{"message":"message is unknown","type" :"x","param":"model"}}'
    expected = b'{"error":{"message":"p\\"q\\\\1 is unknown","type" :"x","param":"model"}}'
    assert restore_text(body, "message", 'p"q\\1') == expected
    assert restore_text(body, "type", "p") == body
    assert restore_text(body, "message", "message") is body


# Headers

HOP_BY_HOP: Headers = [
    (b"Connection", b"keep-alive, X-Private ,x-other"),
    (b"connection", b"X-Third"),
    (b"Keep-Alive", b"timeout=5"),
    (b"Proxy-Connection", b"keep-alive"),
    (b"Proxy-Authenticate", b"Basic"),
    (b"Proxy-Authorization", b"Basic eA=="),
    (b"TE", b"trailers"),
    (b"Trailer", b"x-sum"),
    (b"Transfer-Encoding", b"chunked"),
    (b"Upgrade", b"websocket"),
    (b"x-private", b"1"),
    (b"X-OTHER", b"2"),
    (b"X-Third", b"3"),
]


def test_upstream_headers() -> None:
    client: Headers = [
        (b"x-private", b"named by a Connection that comes later"),
        (b"Content-Type", b"application/json"),
        *HOP_BY_HOP,
        (b"Host", b"proxy"),
        (b"Content-Length", b"9"),
        (b"Expect", b"100-continue"),
        (b"Accept-Encoding", b"gzip, br"),
        (b"Authorization", b"Bearer secret"),
        (b"X-API-Key", b"secret"),
        (b"api-key", b"secret"),
        (b"Cookie", b"secret"),
        (b"X-Request-Id", b"theirs"),
        (b"Content-Encoding", b"gzip"),
        (b"X-Stainless-Lang", b"python"),
        (b"X-Stainless-Lang", b"again"),
    ]
    before = list(client)
    assert upstream_headers(
        client, host=b"gpu:8000", request_id=b"ours", authorization=b"Bearer up", length=12
    ) == [
        (b"Content-Type", b"application/json"),
        (b"X-Stainless-Lang", b"python"),
        (b"X-Stainless-Lang", b"again"),
        (b"host", b"gpu:8000"),
        (b"x-request-id", b"ours"),
        (b"accept-encoding", b"identity"),
        (b"authorization", b"Bearer up"),
        (b"content-length", b"12"),
    ]
    assert client == before


def test_connection_cannot_take_away_what_the_proxy_adds() -> None:
    client: Headers = [(b"Connection", b"host, x-request-id, content-length, authorization")]
    assert upstream_headers(
        client, host=b"gpu", request_id=b"ours", authorization=b"Bearer up", length=0
    ) == [
        (b"host", b"gpu"),
        (b"x-request-id", b"ours"),
        (b"accept-encoding", b"identity"),
        (b"authorization", b"Bearer up"),
        (b"content-length", b"0"),
    ]


def test_upstream_headers_of_a_request_without_body_or_credentials() -> None:
    assert upstream_headers(
        [(b"Accept", b"*/*")], host=b"gpu", request_id=b"ours", authorization=None, length=None
    ) == [
        (b"Accept", b"*/*"),
        (b"host", b"gpu"),
        (b"x-request-id", b"ours"),
        (b"accept-encoding", b"identity"),
    ]


@pytest.mark.parametrize("keep_length", [True, False])
def test_client_headers(keep_length: bool) -> None:  # noqa: FBT001 a table
    upstream: Headers = [
        (b"date", b"today"),
        (b"Server", b"uvicorn"),
        (b"Set-Cookie", b"session=1"),
        (b"WWW-Authenticate", b"Bearer"),
        (b"X-Request-Id", b"theirs"),
        *HOP_BY_HOP,
        (b"Content-Type", b"text/event-stream; charset=utf-8"),
        (b"Content-Length", b"42"),
    ]
    assert client_headers(upstream, request_id=b"ours", keep_length=keep_length) == [
        (b"Content-Type", b"text/event-stream; charset=utf-8"),
        *([(b"Content-Length", b"42")] if keep_length else []),
        (b"x-request-id", b"ours"),
    ]


@pytest.mark.parametrize("broken", [b"\r", b"\n", b"\0", b"\r\nAuthorization: x"])
def test_a_field_that_would_break_its_line_goes_no_further(broken: bytes) -> None:
    fields: Headers = [
        (b"x-good", b"1"),
        (b"x-value", b"a" + broken + b"b"),
        (b"x-name" + broken, b"1"),
        (b"x-also-good", b""),
    ]
    good = [(b"x-good", b"1"), (b"x-also-good", b"")]
    up = upstream_headers(fields, host=b"h", request_id=b"r", authorization=None, length=None)
    assert up[:-3] == good
    assert client_headers(fields, request_id=b"r", keep_length=True)[:-1] == good


# A client's chat template


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"model":"a","chat_template":"{{x}}"}', b'{"model":"a"}'),
        (
            b'{"model":"a","chat_template_kwargs":{"chat_template":"{{x}}","k":1e2}}',
            b'{"model":"a","chat_template_kwargs":{"k":1e2}}',
        ),
        (b'{"chat_template":1,"model":"a","chat_template":null}', b'{"model":"a"}'),
        (b'{"model":"a","chat_templ\\u0061te":"{{x}}"}', b'{"model":"a"}'),
        (
            b'{"model":"a","chat_template_kwargs":{"\\u0063hat_template":"x"},"chat_template":""}',
            b'{"model":"a","chat_template_kwargs":{}}',
        ),
    ],
)
def test_a_clients_chat_template_is_dropped(body: bytes, kept: bytes) -> None:
    cut = without_template(peek(body))
    assert write(cut, body, "a") == kept  # also where the model stays the same
    assert unnamed(cut, body) == kept


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a", "chat_template_kwargs": {"enable_thinking": false}}',
        b'{"model": "a", "chat_template_kwargs": "chat_template"}',
        b'{"model": "a", "chat_template_kwargs": [{"chat_template": 1}]}',
        b'{"model": "a", "messages": [{"chat_template": 1}]}',
    ],
)
def test_without_a_template_nothing_is_touched(body: bytes) -> None:
    peeked = peek(body)
    assert without_template(peeked) is peeked
    assert write(peeked, body, "a") is body
    assert unnamed(peeked, body) is body


def test_an_operators_template_still_gets_in() -> None:
    body = b'{"model":"a","chat_template":"theirs"}'
    cut = without_template(peek(body))
    assert write(cut, body, "b", {"chat_template": "ours"}) == (
        b'{"model":"b","chat_template":"ours"}'
    )
