"""Whatever an upstream does wrong: an error before the first byte, a clean break after it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from fake_vllm import CLOSE, HANG, Cut, FakeVllm, Raw, Reply
from proxied import CHAT, Proxied, Start, chat, http, until
from raw_server import RawConnection, RawServer

from lora_proxy import rewrite

LOOPS = ("asyncio", "uvloop")  # conftest.py runs every async test of this module on both

JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
EVENTS_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
TEXT_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
EVENT = b'data: {"model":"tiny"}\n\n'


async def assert_goes_on(p: Proxied, fake: FakeVllm, model: str = "tiny") -> None:
    """The next request is answered."""
    fake.clear_faults()
    assert (await p.ask(model)).status == 200


async def broken_off(p: Proxied, body: dict[str, Any], path: str = CHAT) -> bytes:
    """What came of an answer that must not look complete."""
    async with p.session.post(p.url + path, json=body) as response:
        assert response.status == 200
        return await to_the_break(response)


async def to_the_break(response: aiohttp.ClientResponse, each: Callable[[], object] = int) -> bytes:
    """Reads until the connection breaks, which it must; calls `each` before every read."""
    received = b""
    try:
        while not response.content.at_eof():
            each()
            received += await response.content.readany()
    except (aiohttp.ClientPayloadError, aiohttp.ClientOSError):
        return received
    raise AssertionError("half an answer looks whole")


# --- before the first byte -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (CLOSE, 502, "upstream_closed"),
        (Raw(b"HTTP/1.1 200 OK\r\ncontent-le"), 502, "upstream_closed"),
        (Raw(JSON_HEAD), 502, "upstream_closed"),
        (Raw(JSON_HEAD + b"content-length: 100\r\n\r\n"), 502, "upstream_closed"),
        (Raw(JSON_HEAD + b'content-length: 100\r\n\r\n{"model":"ti'), 502, "upstream_closed"),
        (Raw(JSON_HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{"), 502, "upstream_closed"),
        (Raw(JSON_HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"), 502, "upstream_closed"),
        (Raw(b"HTTP/1.1 100 Continue\r\n\r\n"), 502, "upstream_closed"),
        (Raw(b"HTTP/1.1 500 Oh\r\ncontent-length: 9\r\n\r\nno"), 502, "upstream_closed"),
        (Raw(b"rubbish\r\n\r\n"), 502, "upstream_invalid"),
        (Raw(b"\x00\xff" * 50), 502, "upstream_invalid"),
        (Raw(b"SSH-2.0-OpenSSH_9.6\r\n"), 502, "upstream_invalid"),
        (Raw(b"HTTP/1.1 999999 OK\r\n\r\n"), 502, "upstream_invalid"),
        (Raw(b"HTTP/1.1 101 Hm\r\nupgrade: x\r\n\r\n"), 502, "upstream_invalid"),
        (Raw(JSON_HEAD + b"content-length: ten\r\n\r\n"), 502, "upstream_invalid"),
        (Raw(JSON_HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"), 502, "upstream_invalid"),
        (Raw(JSON_HEAD + b"x: " + b"y" * 100_000 + b"\r\n\r\n"), 502, "upstream_invalid"),
        (Raw(b"HTTP/1.1 200 " + b"y" * 100_000), 502, "upstream_invalid"),
    ],
)
@pytest.mark.parametrize("model", ["tiny", "sql"])
async def test_no_answer_is_a_502(
    fake: FakeVllm, proxied: Start, fault: Raw, status: int, code: str, model: str
) -> None:
    async with proxied(fake) as p:
        fake.inject(fault, path=CHAT)
        answer = await p.ask(model)
        assert (answer.status, answer.code) == (status, code)
        assert answer.json["error"]["code"] == code
        assert "gpu-0" in answer.json["error"]["message"]
        assert len(fake.requests_to(CHAT)) == 1  # it may have begun to generate: once only
        await assert_goes_on(p, fake, model)


@pytest.mark.parametrize(
    "fault",
    [
        HANG,
        Raw(b"HTTP/1.1 200 OK\r\n", then="hang"),
        Raw(JSON_HEAD + b'content-length: 100\r\n\r\n{"mod', then="hang"),
    ],
)
async def test_silence_is_a_504(fake: FakeVllm, proxied: Start, fault: Raw) -> None:
    async with proxied(fake, timeouts={"read": 1.0}) as p:
        fake.inject(fault, path=CHAT)
        answer = await p.ask("tiny")
        assert (answer.status, answer.code) == (504, "upstream_timeout")
        assert "timeouts.read" in answer.json["error"]["message"]
        await assert_goes_on(p, fake)


async def test_a_refused_connection_is_a_502(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        await fake.stop()
        for answer in (await p.ask("tiny"), await p.ask("sql"), await p.get("/v1/other")):
            assert (answer.status, answer.code) == (502, "upstream_connect")
        for answer in (await p.ask("tiny"), await p.ask("sql"), await p.get("/v1/other")):
            # It is known to be down now; each request is a try all the same.
            assert (answer.status, answer.code) == (503, "no_upstream")
            assert answer.headers["retry-after"] == "5"
        await fake.start()
        await assert_goes_on(p, fake)
        await assert_goes_on(p, fake, "sql")


async def test_a_connection_that_is_closed_as_it_is_made_is_a_502(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.accepting = False
        answer = await p.ask("tiny")
        assert (answer.status, answer.code) == (502, "upstream_closed")
        fake.accepting = True
        await assert_goes_on(p, fake)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_an_error_on_messages_has_anthropics_shape(
    fake: FakeVllm, proxied: Start, path: str
) -> None:
    async with proxied(fake) as p:
        fake.inject(CLOSE, path=path)
        answer = await p.post(path, chat("tiny", max_tokens=5))
        assert (answer.status, answer.code) == (502, "upstream_closed")
        assert answer.json["error"]["type"] == "api_error"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("body", [b'{"error":{"message":"own words"}}', b"plain", b""])
async def test_an_error_of_the_upstreams_own_is_passed_through(
    fake: FakeVllm, proxied: Start, status: int, body: bytes
) -> None:
    async with proxied(fake) as p:
        kind = "application/json" if body.startswith(b"{") else "text/plain"
        fake.inject(Reply(status, body, {"content-type": kind}), path=CHAT)
        for model in ("tiny", "sql"):
            answer = await p.ask(model)
            assert (answer.status, answer.body) == (status, body)
            assert "x-lora-proxy-error" not in answer.headers
        assert len(fake.requests_to(CHAT)) == 2
        await assert_goes_on(p, fake)


@pytest.mark.parametrize("how", ["announced", "silent"])
async def test_an_upstream_that_hangs_up_after_each_answer_costs_no_request(
    fake: FakeVllm, proxied: Start, how: Any
) -> None:
    async with proxied(fake) as p:
        fake.hang_up = how
        for _ in range(5):
            assert (await p.ask("sql")).status == 200
            assert (await p.ask("tiny", stream=True)).body.endswith(b"[DONE]\n\n")


async def test_rubbish_behind_an_answer_is_nobodys_next_answer(
    fake: FakeVllm, proxied: Start
) -> None:
    good = b'content-length: 16\r\n\r\n{"model":"tiny"}'
    async with proxied(fake) as p:
        fake.inject(Raw(JSON_HEAD + good + JSON_HEAD + good, then="hang"), path=CHAT, times=1)
        assert (await p.ask("tiny")).json == {"model": "tiny"}
        assert (await p.ask("tiny", "next")).json["choices"]


async def test_an_answer_that_began_elsewhere_is_not_asked_for_again(proxied: Start) -> None:
    async with FakeVllm() as one, FakeVllm() as two, proxied(one, two) as p:
        for fake in (one, two):
            fake.inject(CLOSE, path=CHAT)
        assert (await p.ask("tiny")).status == 502
        assert len(one.requests_to(CHAT)) + len(two.requests_to(CHAT)) == 1


# --- after it ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "sql"])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
async def test_a_stream_that_ends_between_events_ends_with_an_error_event(
    fake: FakeVllm, proxied: Start, path: str, model: str
) -> None:
    async with proxied(fake) as p:
        fake.inject(Cut(3), path=path)
        body = chat(model, stream=True, max_tokens=50) | {"input": "hi"}
        answer = await p.post(path, body)  # complete, as HTTP has it
        *events, last, rest = answer.body.split(b"\n\n")
        assert rest == b""
        assert len(events) == 3
        name, _, data = last.rpartition(b"data: ")
        error = json.loads(data)["error"]
        assert "gpu-0" in error["message"]
        if path == "/v1/messages":
            assert name == b"event: error\n"
            assert error["type"] == "api_error"
        else:
            assert name == b""
            assert error["code"] == "upstream_closed"
        await assert_goes_on(p, fake, model)


@pytest.mark.parametrize("model", ["tiny", "sql"])
async def test_a_stream_that_ends_inside_an_event_is_cut_off(
    fake: FakeVllm, proxied: Start, model: str
) -> None:
    async with proxied(fake) as p:
        fake.split = 50
        fake.inject(Cut(3), path=CHAT)
        received = await broken_off(p, chat(model, stream=True))
        assert b"error" not in received
        fake.split = None
        await assert_goes_on(p, fake, model)


async def test_a_stream_that_falls_silent_ends_with_an_error_event(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, timeouts={"read": 1.0}) as p:
        chunk = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
        fake.inject(
            Raw(EVENTS_HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk, then="hang"), path=CHAT
        )
        answer = await p.ask("tiny", stream=True)
        assert answer.body.startswith(EVENT)
        assert b'"code":"upstream_timeout"' in answer.body
        await until(lambda: not p.members[0].pool.connections)
        await assert_goes_on(p, fake)


async def test_a_stream_that_breaks_before_its_first_event_says_so(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.inject(Raw(EVENTS_HEAD + b"transfer-encoding: chunked\r\n\r\n"), path=CHAT)
        answer = await p.ask("tiny", stream=True)
        assert answer.status == 200
        assert b'"code":"upstream_closed"' in answer.body
        await assert_goes_on(p, fake)


async def test_the_end_of_an_event_is_seen_however_it_is_cut(proxied: Start) -> None:
    """Its last two bytes come one by one, and then no more."""
    go_on = asyncio.Event()

    async def script(peer: RawConnection) -> None:
        if (await peer.request()).startswith(b"POST"):
            head = EVENTS_HEAD + b"transfer-encoding: chunked\r\n\r\n"
            await peer.send(head + b"%x\r\n%s\r\n" % (len(EVENT) - 1, EVENT[:-1]))
            await go_on.wait()
            await peer.send(b"1\r\n\n\r\n")

    async with RawServer(script) as server, proxied(server, upstream={"base_model": "tiny"}) as p:
        body = chat("tiny", stream=True)
        async with p.session.post(p.url + CHAT, json=body) as response:
            assert await response.content.readany() == EVENT[:-1]
            go_on.set()
            rest = await response.read()
        assert rest.startswith(b'\ndata: {"error"')


@pytest.mark.parametrize(
    "answer",
    [
        TEXT_HEAD + b"content-length: 100\r\n\r\nhalf",
        TEXT_HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        TEXT_HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nrubbish\r\n",
        EVENTS_HEAD + b"content-length: 100\r\n\r\ndata: hal",
        JSON_HEAD + b'content-length: 2000000\r\n\r\n{"model":"' + b"x" * 1_500_000,
    ],
)
@pytest.mark.parametrize("model", ["tiny", "sql"])
async def test_half_an_answer_does_not_look_whole(
    fake: FakeVllm, proxied: Start, answer: bytes, model: str
) -> None:
    async with proxied(fake) as p:
        fake.inject(Raw(answer), path=CHAT)
        await broken_off(p, chat(model))
        await assert_goes_on(p, fake, model)


async def test_events_of_a_known_length_that_break_off_stay_in_frame(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.inject(Raw(EVENTS_HEAD + b"content-length: 100\r\n\r\n" + EVENT), path=CHAT)
        answer = await p.ask("tiny", stream=True)
        assert answer.body.startswith(EVENT)
        assert answer.body.endswith(b"}\n\n")
        assert b'"code":"upstream_closed"' in answer.body
        assert "content-length" not in answer.headers
        await assert_goes_on(p, fake)


async def test_an_answer_that_only_the_end_of_the_connection_ends_is_whole(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        for head, body in ((TEXT_HEAD, b"all of it"), (EVENTS_HEAD, EVENT), (JSON_HEAD, b"{}")):
            fake.inject(Raw(head + b"\r\n" + body), path=CHAT, times=1)
            answer = await p.ask("tiny")
            assert (answer.status, answer.body) == (200, body)


async def test_a_client_of_http_1_0_sees_a_broken_answer_too(
    fake: FakeVllm, proxied: Start
) -> None:
    """It takes the end of the connection for the end of the answer, so that must be a reset."""
    async with proxied(fake) as p:
        fake.inject(
            Raw(TEXT_HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"), path=CHAT, times=1
        )
        request = http(CHAT, json.dumps(chat("tiny")).encode()).replace(b"HTTP/1.1", b"HTTP/1.0")
        with pytest.raises(ConnectionResetError):
            await p.raw(request)
        await assert_goes_on(p, fake)


async def test_a_fault_of_our_own_in_mid_answer_does_not_look_like_the_rest_of_it(
    fake: FakeVllm, proxied: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore, calls = rewrite.Restorer.feed, 0

    def feed(self: rewrite.Restorer, data: bytes) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise ZeroDivisionError
        return restore(self, data)

    async with proxied(fake) as p:
        await p.ask("sql")
        monkeypatch.setattr(rewrite.Restorer, "feed", feed)
        fake.stream_gate.shut()
        body = chat("sql", stream=True)
        async with p.session.post(p.url + CHAT, json=body) as response:
            calls = 0
            received = await to_the_break(response, fake.stream_gate.let)
        assert received.count(b"data: ") == 2
        assert b"internal_error" not in received
        assert b"HTTP/1.1" not in received
        monkeypatch.undo()
        fake.stream_gate.open()
        (fault,) = p.faults
        assert "ZeroDivisionError" in fault
        p.faults.clear()
        await assert_goes_on(p, fake, "sql")


async def test_a_fault_of_our_own_before_an_answer_is_a_500_with_its_id(
    fake: FakeVllm, proxied: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peek(_body: bytes) -> rewrite.Peek:
        raise ZeroDivisionError

    async with proxied(fake) as p:
        monkeypatch.setattr(rewrite, "peek", peek)
        answer = await p.ask("tiny")
        assert (answer.status, answer.code) == (500, "internal_error")
        assert answer.headers["x-request-id"] in answer.json["error"]["message"]
        assert "ZeroDivision" not in answer.body.decode()
        monkeypatch.undo()
        assert answer.headers["x-request-id"] in p.faults.pop()
        await assert_goes_on(p, fake)


# --- probes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/health", Reply(500, b"EngineDeadError")),
        ("/health", CLOSE),
        ("/v1/models", Reply(200, b"<html>hello</html>")),
        ("/v1/models", Reply(200, {"data": [{"no": "id"}]})),
        ("/v1/models", Reply(401, {"error": "key?"})),
        ("/v1/models", Raw(b"rubbish\r\n\r\n")),
    ],
)
async def test_an_upstream_that_fails_its_probes_is_down_until_it_answers_one(
    fake: FakeVllm, proxied: Start, path: str, fault: Any
) -> None:
    async with proxied(fake, probe_interval=0.02) as p:
        await p.ask("sql")
        fake.inject(fault, path=path)
        await until(lambda: not p.app.fleet.ready)
        assert (await p.get("/ready")).status == 503
        assert (await p.ask("sql")).status == 200  # tried all the same: it is all we have
        fake.clear_faults()
        await until(lambda: p.app.fleet.ready)
        assert len(fake.loads) == 1


async def test_an_upstream_that_is_down_is_the_last_choice(proxied: Start) -> None:
    async with (
        FakeVllm() as one,
        FakeVllm() as two,
        proxied(one, two, probe_interval=0.02) as p,
    ):
        one.inject(Reply(500, b"dead"), path="/health")
        await until(lambda: not p.members[0].health.up)
        for _ in range(5):
            assert (await p.ask("tiny")).status == 200
        assert not one.requests_to(CHAT)
        assert len(two.requests_to(CHAT)) == 5
