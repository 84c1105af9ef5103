"""One request's way through the proxy: names, bodies, headers, streams, and its own answers."""

import asyncio
import json
from typing import Any

import pytest
from fake_vllm import FakeVllm, Reply
from proxied import CHAT, Answer, Start, chat, http, parsed, until
from raw_server import RawConnection, RawServer

from lora_proxy.types import Adapter
from lora_proxy.upstream import Response

LOOPS = ("asyncio", "uvloop")  # conftest.py runs every async test of this module on both

SQL = Adapter("sql", "/adapters/sql", aliases=("gpt-3.5-turbo", "text davinci"))
HIDDEN = Adapter("org/secret", "/adapters/secret", hidden=True)

QUESTIONS: dict[str, dict[str, object]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50},
}
paths = pytest.mark.parametrize("path", QUESTIONS)


def served(fake: FakeVllm, name: str) -> str:
    """The served name under which the fake has an adapter."""
    return next(lora for lora in fake.loras if lora.startswith(f"{name}@"))


def models_in(value: Any) -> list[str]:
    """Every `model` in a JSON value, however deep."""
    if isinstance(value, list):
        return [name for item in value for name in models_in(item)]
    if not isinstance(value, dict):
        return []
    own = [value["model"]] if "model" in value else []
    return own + [name for item in value.values() for name in models_in(item)]


def events(body: bytes) -> list[Any]:
    """The JSON of every event."""
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line[:5] == b"data:"]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def said(answer: Answer) -> str:
    return str(answer.json["choices"][0]["message"]["content"])


# --- whose answer it is --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sql", "gpt-3.5-turbo", "text davinci"])
async def test_an_adapter_answers_to_its_name_and_aliases(
    fake: FakeVllm, proxied: Start, name: str
) -> None:
    async with proxied(fake, adapters=[SQL]) as p:
        answer = await p.ask(name)
        assert answer.status == 200
        assert said(answer) == f"I am {served(fake, 'sql')}. You said: hi"
        assert answer.json["model"] == name
        assert [path for _, path in fake.loads] == ["/adapters/sql"]


async def test_the_base_model_answers_to_its_name(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        answer = await p.ask("tiny")
        assert said(answer) == "I am tiny. You said: hi"
        assert answer.json["model"] == "tiny"
        assert fake.loads == []


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}])
@paths
async def test_no_model_is_the_base_model_written_out(
    fake: FakeVllm, proxied: Start, path: str, body: dict[str, object]
) -> None:
    async with proxied(fake) as p:
        answer = await p.post(path, body | QUESTIONS[path])
        assert answer.status == 200
        assert answer.json["model"] == "tiny"
        assert fake.requests_to(path)[0].json["model"] == "tiny"


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}, {"model": "no such"}])
async def test_no_model_and_an_unknown_one_are_the_default_model(
    fake: FakeVllm, proxied: Start, body: dict[str, object]
) -> None:
    async with proxied(fake, default_model="sql") as p:
        answer = await p.post(CHAT, QUESTIONS[CHAT] | body)
        assert said(answer).startswith(f"I am {served(fake, 'sql')}.")
        assert answer.json["model"] == "sql"


async def test_an_alias_as_default_model_answers_as_its_adapter(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, adapters=[SQL], default_model="gpt-3.5-turbo") as p:
        assert (await p.ask(None)).json["model"] == "sql"


async def test_an_unknown_name_in_place_of_the_default_is_not_repeated_in_each_event(
    fake: FakeVllm, proxied: Start
) -> None:
    """Else a client could have its own megabytes sent back many times over, and remembered."""
    async with proxied(fake, default_model="sql") as p:
        answer = await p.ask("x" * 100_000, stream=True)
        assert answer.status == 200
        assert len(answer.body) < 10_000
        assert set(models_in(events(answer.body))) == {"sql"}


@paths
async def test_an_unknown_model_is_a_404_that_names_the_closest(
    fake: FakeVllm, proxied: Start, path: str
) -> None:
    async with proxied(fake) as p:
        answer = await p.post(path, {"model": "sqll"} | QUESTIONS[path])
        assert answer.status == 404
        assert answer.code == "model_not_found"
        assert "'sql'" in answer.json["error"]["message"]
        assert not fake.requests_to(path)


# --- the request's body --------------------------------------------------------------------


async def test_every_value_of_the_body_arrives_as_the_client_wrote_it(
    fake: FakeVllm, proxied: Start
) -> None:
    body = (
        b'{"messages" : [ {"role":"user",  "content":"h\\u0069\\ud83d\\ude00"} ],\n'
        b'"temperature":1.10000000000000000001e-0, "big":123456789012345678901234567890,'
        b'"nested":{"a":1,"a" : 2,  "b":[ 1,2 , 3]},\t"unknown":-0.0, "model" : "sql","z":null}'
    )
    async with proxied(fake) as p:
        assert (await p.post(CHAT, body)).status == 200
        seen = fake.requests_to(CHAT)[0].body
        for value in (
            b'[ {"role":"user",  "content":"h\\u0069\\ud83d\\ude00"} ]',
            b"1.10000000000000000001e-0",
            b"123456789012345678901234567890",
            b'{"a":1,"a" : 2,  "b":[ 1,2 , 3]}',
            b"-0.0",
        ):
            assert value in seen
        assert json.loads(seen) == json.loads(body) | {"model": served(fake, "sql")}
        assert list(json.loads(seen)) == list(json.loads(body))


async def test_a_body_for_the_base_model_passes_untouched(fake: FakeVllm, proxied: Start) -> None:
    body = b'{ "model":"tiny",\n "prompt" : "hi" , "n":1e0 }'
    async with proxied(fake) as p:
        await p.post("/v1/completions", body)
        assert fake.requests_to("/v1/completions")[0].body == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"tiny","prompt":"hi","model":"sql"}',
        b'{"mod\\u0065l":"tiny","prompt":"hi","model":"sql"}',
        b'{"model":"tiny","prompt":"hi","\\u006dodel":"sql"}',
    ],
)
async def test_all_duplicates_of_model_become_one(
    fake: FakeVllm, proxied: Start, body: bytes
) -> None:
    async with proxied(fake) as p:
        assert (await p.post("/v1/completions", body)).json["model"] == "sql"
        seen = fake.requests_to("/v1/completions")[0].body
        pairs = json.loads(seen, object_pairs_hook=list)
        assert [value for key, value in pairs if key == "model"] == [served(fake, "sql")]


async def test_defaults_fill_in_and_overrides_win(fake: FakeVllm, proxied: Start) -> None:
    adapter = Adapter(
        "sql",
        "/adapters/sql",
        defaults={"temperature": 0.95, "top_p": 0.7},
        overrides={"max_tokens": 3, "extra": {"deep": [1]}},
    )
    async with proxied(fake, adapters=[adapter]) as p:
        await p.ask("sql", top_p=0.1, max_tokens=500)
        await p.ask("tiny", top_p=0.1)
        adapted, base = (seen.json for seen in fake.requests_to(CHAT))
        assert adapted["temperature"] == 0.95
        assert adapted["top_p"] == 0.1
        assert adapted["max_tokens"] == 3
        assert adapted["extra"] == {"deep": [1]}
        assert "temperature" not in base


# --- the answer's body ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@paths
async def test_answers_carry_the_public_name_and_nothing_else_changes(
    fake: FakeVllm, proxied: Start, path: str, *, stream: bool
) -> None:
    async with proxied(fake) as p:
        headers = {"x-request-id": "same"}  # which the fake makes its ids of
        body = QUESTIONS[path] | {"stream": stream}
        answer = await p.post(path, {"model": "sql"} | body, headers=headers)
        name = served(fake, "sql")
        straight = await p.session.post(
            fake.url + path, json={"model": name} | body, headers=headers
        )
        expected = (await straight.read()).replace(f'"model":"{name}"'.encode(), b'"model":"sql"')
        assert answer.status == 200
        assert answer.body == expected
        names = models_in(events(answer.body) if stream else answer.json)
        assert set(names) == {"sql"}
        assert f"I am {name}" in answer.body.decode() or stream  # what a model says is its own


@paths
async def test_names_are_restored_wherever_reads_cut_them(
    fake: FakeVllm, proxied: Start, path: str
) -> None:
    async with proxied(fake, adapters={"s": "/adapters/s"}) as p:
        body = QUESTIONS[path] | {"model": "s", "stream": True, "max_tokens": 1}
        headers = {"x-request-id": "same"}
        whole = await p.post(path, body, headers=headers)
        longest = len(b'"model": "%s"' % served(fake, "s").encode())
        for size in range(1, longest + 2):
            fake.split = size
            assert (await p.post(path, body, headers=headers)).body == whole.body, size


async def test_text_that_looks_like_the_served_name_is_left_alone(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        prompt = f'"model":"{served(fake, "sql")}" {{\\"model\\": \\"x\\"}}'
        for fields in ({}, {"stream": True}):
            answer = await p.ask("sql", prompt, **fields)
            text = (
                "".join(
                    event["choices"][0]["delta"].get("content", "") for event in events(answer.body)
                )
                if fields
                else said(answer)
            )
            assert text == f"I am {served(fake, 'sql')}. You said: {prompt}"


async def test_an_answer_in_which_nothing_is_to_restore_passes_untouched(
    fake: FakeVllm, proxied: Start
) -> None:
    odd = b'{ "model" :\t"tiny" , "model":"tiny@00000000", "n": 1e2 }\n'
    async with proxied(fake) as p:
        fake.inject(Reply(200, odd, {"content-type": "application/json"}), path=CHAT)
        answer = await p.ask("tiny")
        assert answer.body == odd
        assert answer.headers["content-length"] == str(len(odd))


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "audio/wav"])
async def test_a_large_answer_arrives_whole(
    fake: FakeVllm, proxied: Start, content_type: str
) -> None:
    large = b'{"model":"tiny","x":"' + b"y" * 3_000_000 + b'"}'
    async with proxied(fake) as p:
        fake.inject(Reply(200, large, {"content-type": content_type}), path=CHAT)
        for model in ("tiny", "sql"):
            answer = await p.ask(model)
            assert answer.body == large
            assert answer.headers["content-type"] == content_type


async def test_the_length_of_a_restored_answer_is_right(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        answer = await p.ask("sql")
        assert answer.headers["content-length"] == str(len(answer.body))
        assert "transfer-encoding" not in answer.headers


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
async def test_an_error_of_the_upstream_keeps_its_status_and_says_the_public_name(
    fake: FakeVllm, proxied: Start, status: int
) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        name = served(fake, "sql")
        body = {"error": {"message": f"The adapter `{name}` is tired.", "model": name, "code": 7}}
        fake.inject(Reply(status, body, {"retry-after": "9"}), path=CHAT)
        answer = await p.ask("sql")
        assert answer.status == status
        assert answer.headers["retry-after"] == "9"
        assert "x-lora-proxy-error" not in answer.headers
        assert answer.json == {
            "error": {"message": "The adapter `sql` is tired.", "model": "sql", "code": 7}
        }


# --- HTTP ----------------------------------------------------------------------------------


async def test_a_client_of_http_1_0_gets_its_answer_and_the_end_of_the_connection(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        for stream in (b"false", b"true"):
            body = b'{"model":"sql","prompt":"hi","stream":%s}' % stream
            answer = parsed(
                await p.raw(
                    b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n%s" % (len(body), body)
                )
            )
            assert answer.status == 200
            assert "transfer-encoding" not in answer.headers
            found = models_in(events(answer.body) if stream == b"true" else answer.json)
            assert set(found) == {"sql"}


async def test_a_connection_is_kept_and_pipelined_requests_are_answered_in_order(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        one, two = (json.dumps(chat("sql", word)).encode() for word in ("one", "two"))
        first = http(CHAT, one).replace(b"connection: close\r\n", b"")
        raw = await p.raw(first + http(CHAT, two))
        assert raw.count(b"HTTP/1.1 200 OK") == 2
        assert 0 < raw.index(b"You said: one") < raw.index(b"You said: two")


async def test_one_client_connection_serves_many_requests(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p, p.connected() as (reader, writer):
        for word in ("one", "two", "three"):
            body = json.dumps(chat("sql", word)).encode()
            writer.write(http(CHAT, body).replace(b"connection: close\r\n", b""))
            head = await reader.readuntil(b"\r\n\r\n")
            answer = await reader.readexactly(int(parsed(head).headers["content-length"]))
            assert f"You said: {word}".encode() in answer


async def test_head_is_answered_without_a_body(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        whole = await p.get("/v1/models")
        answer = parsed(await p.raw(http("/v1/models", method="HEAD")))
        assert answer.status == 200
        assert answer.body == b""
        assert answer.headers["content-length"] == whole.headers["content-length"]


async def test_a_forwarded_head_keeps_the_length_that_a_get_would_have(proxied: Start) -> None:
    async def script(peer: RawConnection) -> None:
        request = await peer.request()
        if request.startswith(b"HEAD"):
            await peer.send(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 123\r\n\r\n"
            )

    async with RawServer(script) as server, proxied(server) as p:
        server.requests.clear()
        answer = parsed(await p.raw(http("/v1/whatever", method="HEAD")))
        assert answer.status == 200
        assert answer.headers["content-length"] == "123"
        assert server.requests[0].startswith(b"HEAD /v1/whatever HTTP/1.1\r\n")


async def test_an_unlisted_path_is_forwarded_with_its_query_and_body(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.inject(Reply(201, b"\x00\xffdone", {"content-type": "application/x-odd"}))
        request = http("/v1//files/./a%20b?x=%2F&y", b"\x00\x01", "x-own: 1", method="PUT")
        raw = await p.raw(request.replace(b"application/json", b"application/x-own"))
        assert parsed(raw).status == 201
        assert raw.endswith(b"\r\n\r\n\x00\xffdone")
        seen = fake.requests[-1]
        assert (seen.method, seen.path) == ("PUT", "/v1/files/a%20b?x=%2F&y")
        assert seen.body == b"\x00\x01"
        assert seen.headers["x-own"] == "1"


async def test_json_on_an_unlisted_path_gets_the_same_service(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.inject(Reply(200, {"model": "?"}), path="/v1/future")
        await p.post("/v1/future", {"model": "sql"})
        await p.post("/v1/future", {"no": "model"})
        assert (await p.post("/v1/future", b"[1, 2]")).code == "invalid_json"
        first, second = fake.requests_to("/v1/future")
        assert first.json == {"model": served(fake, "sql")}
        assert second.json == {"no": "model"}


async def test_an_upload_passes_untouched(fake: FakeVllm, proxied: Start) -> None:
    form = b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n\xff\xfe\r\n--b--\r\n'
    async with proxied(fake) as p:
        fake.inject(Reply(200, {"text": "hello"}), path="/v1/audio/transcriptions")
        answer = await p.post(
            "/v1/audio/transcriptions",
            form,
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        assert answer.json == {"text": "hello"}
        seen = fake.requests_to("/v1/audio/transcriptions")[0]
        assert seen.body == form
        assert seen.headers["content-type"] == "multipart/form-data; boundary=b"


async def test_the_request_id_is_made_passed_and_sent_upstream(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        made = [(await p.ask("tiny")).headers["x-request-id"] for _ in range(2)]
        made.append((await p.get("/health")).headers["x-request-id"])
        made.append((await p.ask("nope")).headers["x-request-id"])
        given = await p.post(CHAT, chat("tiny"), headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        assert len({*made, "mine-1"}) == 5
        ids = [seen.headers["x-request-id"] for seen in fake.requests_to(CHAT)]
        assert ids == [*made[:2], "mine-1"]


@pytest.mark.parametrize("bad", ["", "two words", "x" * 129, "caf\u00e9"])
async def test_a_request_id_that_is_no_token_is_replaced(
    fake: FakeVllm, proxied: Start, bad: str
) -> None:
    async with proxied(fake) as p:
        raw = await p.raw(http("/health", b"", f"x-request-id: {bad}", method="GET"))
        assert parsed(raw).headers["x-request-id"] != bad


async def test_credentials_stay_on_their_side(fake: FakeVllm, proxied: Start) -> None:
    client = {
        "authorization": "Bearer client-secret",
        "x-api-key": "client-secret",
        "api-key": "client-secret",
        "cookie": "session=client-secret",
        "proxy-authorization": "Basic client-secret",
    }
    async with proxied(fake, upstream={"api_key": "upstream-secret"}) as p:
        fake.inject(
            Reply(401, {"error": "who?"}, {"set-cookie": "a=b", "www-authenticate": "Bearer"}),
            path="/v1/other",
        )
        answers = [
            await p.post(CHAT, chat("sql"), headers=client),
            await p.get("/v1/models"),
            await p.request("GET", "/v1/other", headers=client),
        ]
        for seen in fake.requests:  # probes and loads too
            assert "client-secret" not in str(seen.headers)
            assert seen.headers["authorization"] == "Bearer upstream-secret"
        for answer in answers:
            assert "upstream-secret" not in str(answer.headers) + answer.body.decode()
            assert not {"set-cookie", "www-authenticate"} & set(answer.headers)


async def test_hop_by_hop_fields_end_here_and_all_others_pass(proxied: Start) -> None:
    async def script(peer: RawConnection) -> None:
        while True:
            await peer.request()
            await peer.send(
                b"HTTP/1.1 200 Fine\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
                b"Keep-Alive: timeout=5\r\nServer: uvicorn\r\nDate: never\r\n"
                b"X-Two: a\r\nX-Two: b\r\nX-Odd: caf\xc3\xa9 \xff\r\n"
                b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
            )

    async with RawServer(script) as server, proxied(server) as p:
        server.requests.clear()
        request = http("/v1/x", b"", "te: trailers", "x-hop: 2", "x-kept: 3", method="GET")
        request = request.replace(b"connection: close", b"connection: close, x-hop")
        head, _, body = (await p.raw(request)).partition(b"\r\n\r\n")
        lines = [line.lower() for line in head.split(b"\r\n")]
        assert body == b"ok"
        assert lines[0] == b"http/1.1 200 fine"
        assert [line for line in lines if line.startswith(b"x-two")] == [b"x-two: a", b"x-two: b"]
        assert any(line.startswith(b"x-odd: caf") for line in lines)
        assert [line for line in lines if line.startswith(b"server")] == [b"server: lora-proxy"]
        assert len([line for line in lines if line.startswith(b"date")]) == 1
        assert b"date: never" not in lines
        assert not [line for line in lines if line.startswith((b"x-hop", b"keep-alive"))]
        upstream = server.requests[0].lower()
        assert b"\r\nx-kept: 3\r\n" in upstream
        assert b"x-hop" not in upstream
        assert b"\r\nte:" not in upstream
        assert f"\r\nhost: 127.0.0.1:{server.port}\r\n".encode() in upstream


@pytest.mark.parametrize(("path", "method"), [(CHAT, "POST"), ("/health", "GET")])
async def test_every_answer_is_signed(
    fake: FakeVllm, proxied: Start, path: str, method: str
) -> None:
    async with proxied(fake) as p:
        for body in (json.dumps(chat("sql")), "rubbish"):
            answer = await p.request(method, path, data=body if method == "POST" else None)
            assert answer.headers["server"] == "lora-proxy"
            assert "x-request-id" in answer.headers


# --- answered here -------------------------------------------------------------------------


async def test_models_lists_base_adapters_and_aliases_without_a_path(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, adapters=[SQL, HIDDEN]) as p:
        await p.ask("org/secret")  # resident or not, it is not listed
        answer = await p.get("/v1/models")
        listed = answer.json
        assert listed["object"] == "list"
        assert [(card["id"], card["parent"]) for card in listed["data"]] == [
            ("tiny", None),
            ("sql", "tiny"),
            ("gpt-3.5-turbo", "tiny"),
            ("text davinci", "tiny"),
        ]
        assert {card["object"] for card in listed["data"]} == {"model"}
        assert listed["data"][0]["max_model_len"] == 4096
        assert b"/adapters" not in answer.body
        assert b"/models/" not in answer.body
        assert not fake.requests_to("/v1/models")[2:]  # the probe's, and the load's


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("tiny", "tiny"),
        ("sql", "sql"),
        ("text%20davinci", "text davinci"),
        ("org/secret", "org/secret"),
        ("org%2Fsecret", "org/secret"),
        ("org%2fsecret", "org/secret"),
    ],
)
async def test_one_model_is_shown_hidden_or_not(
    fake: FakeVllm, proxied: Start, path: str, name: str
) -> None:
    async with proxied(fake, adapters=[SQL, HIDDEN]) as p:
        raw = await p.raw(http(f"/v1/models/{path}", method="GET"))
        answer = parsed(raw)
        assert answer.status == 200
        assert answer.json["id"] == name
        assert b"/adapters" not in answer.body


async def test_a_model_that_does_not_exist_is_a_404(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        answer = await p.get("/v1/models/sqll")
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert "'sql'" in answer.json["error"]["message"]


async def test_a_served_name_is_not_a_public_one(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        name = served(fake, "sql")
        assert (await p.ask(name)).code == "model_not_found"
        assert (await p.get(f"/v1/models/{name}")).code == "model_not_found"


async def test_health_and_readiness_follow_the_upstream(fake: FakeVllm, proxied: Start) -> None:
    await fake.stop()
    async with proxied(fake, probe_interval=0.02) as p:
        assert (await p.get("/health")).status == 200
        answer = await p.get("/ready")
        assert (answer.status, answer.code) == (503, "no_upstream")
        assert (await p.ask(None)).code == "no_upstream"
        await fake.start()
        await until(lambda: p.app.fleet.ready)
        assert (await p.get("/ready")).json == {"status": "ready"}
        assert (await p.ask(None)).json["model"] == "tiny"
        await fake.stop()
        await until(lambda: not p.app.fleet.ready)
        assert (await p.get("/ready")).status == 503
        await fake.start()


# --- streams -------------------------------------------------------------------------------


async def test_a_stream_arrives_chunk_by_chunk(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        fake.stream_gate.shut()
        async with p.session.post(p.url + CHAT, json=chat("sql", stream=True)) as response:
            # The head is here before the first event is.
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["transfer-encoding"] == "chunked"
            seen = 0
            while b"[DONE]" not in (data := await self_paced(fake, response)):
                seen += 1
                assert data.endswith(b"\n\n")
                assert data.count(b"\n\n") == 1
                assert b'"model":"sql"' in data
            assert seen == 7  # the role, and six words
            fake.stream_gate.open()


async def self_paced(fake: FakeVllm, response: Any) -> bytes:
    """Lets the fake write one event and reads it; only then may the next be written."""
    fake.stream_gate.let()
    data: bytes = await response.content.readany()
    return data


async def test_a_slow_client_pauses_the_upstream_and_gets_everything(
    proxied: Start,
) -> None:
    event = b"data: " + b'{"model":"tiny","x":"' + b"y" * 65_000 + b'"}\n\n'
    total = 500  # 32 MB
    sent = 0

    async def script(peer: RawConnection) -> None:
        nonlocal sent
        if (await peer.request()).startswith(b"POST"):
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            for _ in range(total):
                await peer.send(event)
                sent += 1

    async with (
        RawServer(script) as server,
        proxied(server, upstream={"base_model": "tiny"}) as p,
        p.connected() as (reader, writer),
    ):
        writer.write(http(CHAT, json.dumps(chat("tiny", stream=True)).encode()))
        head = await reader.readuntil(b"\r\n\r\n")
        assert parsed(head).status == 200
        (connection,) = p.members[0].pool.connections
        await until(lambda: connection._paused)
        assert sent < total
        response = connection._exchange
        assert isinstance(response, Response)
        assert response._size < 1024 * 1024
        everything = await reader.read()
        assert everything.count(b"data: ") == total
        assert everything.count(b"y" * 65_000) > total // 2  # chunk lines cut the others
        assert everything.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("model", ["sql", "tiny"])
async def test_a_client_that_leaves_in_mid_stream_ends_the_generation(
    fake: FakeVllm, proxied: Start, model: str
) -> None:
    async with proxied(fake) as p:
        body = chat(model, stream=True, ignore_eos=True, max_tokens=100_000)
        async with p.session.post(p.url + CHAT, json=body) as response:
            await response.content.readany()
            assert fake.running == 1
            response.close()
            await fake.until(lambda: fake.running == 0)
        assert fake.aborted == 1
        await p.idle()
        assert (await p.ask(model)).status == 200


async def test_a_client_that_leaves_before_the_first_byte_ends_the_generation(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.answer_gate.shut()
        asking = asyncio.ensure_future(p.ask("sql"))
        await fake.until(lambda: fake.answer_gate.waiting == 1)
        assert p.members[0].in_flight == 1
        asking.cancel()
        await fake.until(lambda: fake.running == 0)
        assert fake.aborted == 1
        await p.idle()
        fake.answer_gate.open()


async def test_a_stream_that_ends_gives_its_connection_back(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        await p.ask("sql", stream=True)
        before = fake.connections
        for _ in range(5):
            await p.ask("sql", stream=True)
        assert fake.connections == before
        assert len(p.members[0].pool.idle) == 1


# --- several upstreams ---------------------------------------------------------------------


async def test_a_refused_connection_leads_to_the_next_upstream(
    fake: FakeVllm, proxied: Start
) -> None:
    async with FakeVllm() as other, proxied(fake, other) as p:
        await p.ask("tiny")
        gone, name = (fake, "gpu-0") if fake.requests_to(CHAT) else (other, "gpu-1")
        await gone.stop()
        assert (await p.ask("tiny")).status == 200
        assert (await p.ask("sql")).status == 200
        assert (await p.request("GET", "/v1/other")).status == 404  # the word of the one left
        retries = await p.samples("lora_proxy_retries_total")
        assert retries["upstream_connect", name] >= 2
        await gone.start()


async def test_requests_spread_over_upstreams_by_load(fake: FakeVllm, proxied: Start) -> None:
    async with FakeVllm() as other, proxied(fake, other) as p:
        for server in (fake, other):
            server.answer_gate.shut()
        asking = [asyncio.ensure_future(p.ask("tiny")) for _ in range(10)]
        await until(lambda: fake.running + other.running == 10)
        assert (fake.running, other.running) == (5, 5)
        for server in (fake, other):
            server.answer_gate.open()
        assert {answer.status for answer in await asyncio.gather(*asking)} == {200}


async def test_concurrent_clients_each_get_their_own_answer(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:

        async def client(number: int) -> None:
            model = ("sql", "pirate", "tiny")[number % 3]
            for turn in range(5):
                answer = await p.ask(model, f"{number}-{turn}")
                assert answer.json["model"] == model
                assert said(answer).endswith(f"You said: {number}-{turn}")
                assert said(answer).startswith(f"I am {model}")

        await asyncio.gather(*(client(number) for number in range(20)))
        assert len(fake.loads) == 2
