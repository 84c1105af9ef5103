"""Whatever a client sends gets a clear answer in its API's shape, and the server goes on."""

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest
from fake_vllm import FakeVllm
from proxied import ADAPTERS, CHAT, Answer, Proxied, Start, chat, http, parsed, until

LOOPS = ("asyncio", "uvloop")  # conftest.py runs every async test of this module on both

MESSAGES = "/v1/messages"
CONTROL_CALLS = ("/health", "/v1/models", "/metrics")  # all that a proxy asks without a load


async def assert_goes_on(p: Proxied, fake: FakeVllm) -> None:
    """A good request works, and the bad ones never came to the upstream."""
    seen = [one.path for one in fake.requests if one.path not in CONTROL_CALLS]
    assert seen == []
    answer = await p.ask("tiny", "still there")
    assert answer.json["choices"][0]["message"]["content"] == "I am tiny. You said: still there"


def assert_refused(answer: Answer, status: int, code: str, says: str = "") -> None:
    assert (answer.status, answer.code) == (status, code), answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["server"] == "lora-proxy"
    assert answer.headers["x-request-id"]
    error = answer.json["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]


# --- bodies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"   ", "invalid_json"),
        (b"hello", "invalid_json"),
        (b'{"model":"sql"', "invalid_json"),
        (b'{"model":"sql"} trailing', "invalid_json"),
        (b"{'model':'sql'}", "invalid_json"),
        (b'{"model":"sql","x":NaN}', "invalid_json"),
        (b'\xef\xbb\xbf{"model":"sql"}', "invalid_json"),
        ('{"model":"sql"}'.encode("utf-16"), "invalid_json"),
        (b'{"model":"sql","x":"\xff"}', "invalid_json"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b"[1,2]", "invalid_json"),
        (b'"model"', "invalid_json"),
        (b"null", "invalid_json"),
        (b"7", "invalid_json"),
        (b'{"model":7}', "invalid_model"),
        (b'{"model":["sql"]}', "invalid_model"),
        (b'{"model":{"name":"sql"}}', "invalid_model"),
        (b'{"model":true}', "invalid_model"),
    ],
)
async def test_a_body_that_is_no_question(
    fake: FakeVllm, proxied: Start, body: bytes, code: str
) -> None:
    async with proxied(fake) as p:
        assert_refused(await p.post(CHAT, body), 400, code)
        await assert_goes_on(p, fake)


@pytest.mark.parametrize("name", ["x" * 1_000_000, "\u0000", "\x1b[31m", "../../etc", "{{7*7}}"])
async def test_a_strange_model_name_is_an_unknown_one(
    fake: FakeVllm, proxied: Start, name: str
) -> None:
    async with proxied(fake) as p:
        answer = await p.ask(name)
        assert_refused(answer, 404, "model_not_found")
        assert len(answer.body) < 1000
        assert "\x1b" not in answer.json["error"]["message"]
        await assert_goes_on(p, fake)


async def test_ten_megabytes_are_fine(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        prompt = "x" * 10_000_000
        assert (await p.ask("sql", prompt, max_tokens=1)).status == 200
        assert fake.requests_to(CHAT)[0].json["messages"] == [{"role": "user", "content": prompt}]


async def test_a_body_of_exactly_the_limit_is_fine(fake: FakeVllm, proxied: Start) -> None:
    body = json.dumps(chat("sql")).encode()
    async with proxied(fake, limits={"body": len(body)}) as p:
        assert (await p.post(CHAT, body)).status == 200
        assert_refused(await p.post(CHAT, body + b" "), 413, "body_too_large", "limits.body")


@pytest.mark.parametrize("sent", [b"", b"x" * 2000])
async def test_a_length_over_the_limit_is_refused_before_the_body_comes(
    fake: FakeVllm, proxied: Start, sent: bytes
) -> None:
    async with proxied(fake, limits={"body": 1000}) as p, p.connected() as (reader, writer):
        writer.write(http(CHAT, b"", "content-length: 1000000000") + sent)
        head = await reader.readuntil(b"\r\n\r\n")
        answer = parsed(head)
        body = await reader.readexactly(int(answer.headers["content-length"]))
        assert_refused(Answer(answer.status, answer.headers, body), 413, "body_too_large")
        assert answer.headers["connection"] == "close"
        await assert_goes_on(p, fake)


async def test_chunks_over_the_limit_are_refused_as_they_come(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, limits={"body": 1000}) as p, p.connected() as (reader, writer):
        writer.write(http(CHAT, b"", "transfer-encoding: chunked"))
        for _ in range(3):
            writer.write(b"190\r\n" + b"x" * 400 + b"\r\n")
        answer = parsed(await reader.readuntil(b"}}"))  # while the body has no end yet
        assert_refused(answer, 413, "body_too_large")
        await assert_goes_on(p, fake)


async def test_a_client_that_stops_halfway_is_told_and_closed(
    fake: FakeVllm, proxied: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_proxy.server.LINGER", 0.05)
    for partial in (
        http(CHAT, b"", "content-length: 100") + b'{"model":"sql"',
        http(CHAT, b"", "content-length: 100"),
        http(CHAT, b"", "transfer-encoding: chunked") + b'f\r\n{"model":"sql",\r\n5\r\nab',
    ):
        async with proxied(fake, timeouts={"client": 0.5}) as p:
            keeping = partial.replace(b"connection: close\r\n", b"")
            answer = parsed(await p.raw(keeping))  # until the connection is closed
            assert_refused(answer, 408, "request_timeout")
            assert answer.headers["connection"] == "close"
            await assert_goes_on(p, fake)
        fake.requests.clear()


async def test_a_client_that_leaves_halfway_leaves_nothing(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        async with p.connected() as (_, writer):
            writer.write(http(CHAT, b"", "content-length: 100") + b'{"model":"sql"')
            await writer.drain()
            assert (await p.get("/health")).status == 200
        await until_counted(p, "499")
        await assert_goes_on(p, fake)


async def until_counted(p: Proxied, code: str) -> None:
    """A request that has no answer shows in the metrics only."""
    for _ in range(1000):
        if [key for key in await p.samples("lora_proxy_requests_total") if code in key]:
            return
    raise AssertionError(f"no request was counted with {code}")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "GZip"])
async def test_a_compressed_body_is_unpacked_and_no_longer_called_compressed(
    fake: FakeVllm, proxied: Start, coding: str
) -> None:
    body = json.dumps(chat("sql")).encode()
    packed = gzip.compress(body) if coding.lower() == "gzip" else zlib.compress(body)
    async with proxied(fake) as p:
        raw = await p.raw(http(CHAT, packed, f"content-encoding: {coding}"))
        assert parsed(raw).status == 200
        seen = fake.requests_to(CHAT)[0]
        assert "content-encoding" not in seen.headers
        assert seen.json == chat(fake.lora_names[0])


async def test_a_compressed_upload_is_unpacked_too(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        packed = gzip.compress(b"\x00\x01\x02")
        request = http("/v1/files", packed, "content-encoding: gzip")
        await p.raw(request.replace(b"application/json", b"application/x-own"))
        seen = fake.requests_to("/v1/files")[0]
        assert seen.body == b"\x00\x01\x02"
        assert "content-encoding" not in seen.headers


async def test_a_compressed_bomb_meets_the_limit_unpacked(fake: FakeVllm, proxied: Start) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    async with proxied(fake, limits={"body": 100_000}) as p:
        answer = parsed(await p.raw(http(CHAT, bomb, "content-encoding: gzip")))
        assert_refused(answer, 413, "body_too_large")
        await assert_goes_on(p, fake)


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (b"this is not gzip", "gzip"),
        (gzip.compress(b'{"model":"sql"}') + b"more", "gzip"),
        (b'{"model":"sql"}', "br"),
        (b'{"model":"sql"}', "zstd"),
        (b'{"model":"sql"}', "gzip, gzip"),
        (b'{"model":"sql"}', "rot13"),
    ],
)
async def test_a_coding_that_is_broken_or_unknown(
    fake: FakeVllm, proxied: Start, body: bytes, coding: str
) -> None:
    async with proxied(fake, timeouts={"client": 600.0}) as p:
        answer = parsed(await p.raw(http(CHAT, body, f"content-encoding: {coding}")))
        assert_refused(answer, 400, "bad_request")
        await assert_goes_on(p, fake)


async def test_expect_100_continue_is_answered_before_the_body(
    fake: FakeVllm, proxied: Start
) -> None:
    body = json.dumps(chat("sql")).encode()
    async with proxied(fake) as p, p.connected() as (reader, writer):
        length = f"content-length: {len(body)}"
        writer.write(
            http(CHAT, b"", length, "content-type: application/json", "expect: 100-continue")
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        answer = parsed(await reader.read())
        assert answer.status == 200
        assert answer.json["model"] == "sql"
        assert "expect" not in fake.requests_to(CHAT)[0].headers


async def test_expect_100_continue_saves_sending_a_body_that_is_too_large(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, limits={"body": 10}) as p, p.connected() as (reader, writer):
        writer.write(http(CHAT, b"", "content-length: 11", "expect: 100-continue"))
        assert parsed(await reader.readuntil(b"\r\n\r\n")).status == 413


# --- heads ---------------------------------------------------------------------------------

LIMIT = 4096


@pytest.mark.parametrize(
    "request_bytes",
    [
        http("/health", b"", "x: " + "y" * LIMIT, method="GET"),
        http("/health", b"", "x" * LIMIT + ": y", method="GET"),
        http("/health?" + "y" * LIMIT, method="GET"),
        http("/v1/" + "y" * LIMIT, method="GET"),
        http("/health", b"", *(f"x-{n}: {'y' * 90}" for n in range(50)), method="GET"),
        http("/health", b"", *(f"x-{n}: y" for n in range(500)), method="GET"),
        http("/health", b"", "x: " + "y" * 5_000_000, method="GET"),
        b"GET /" + b"y" * LIMIT,  # and no end of it
    ],
    ids=["value", "name", "query", "path", "together", "number", "huge", "endless"],
)
async def test_headers_that_are_too_large(
    fake: FakeVllm, proxied: Start, request_bytes: bytes
) -> None:
    async with proxied(fake, limits={"headers": LIMIT}) as p:
        async with p.connected() as (reader, writer):
            writer.write(request_bytes)
            answer = parsed(await reader.readuntil(b"}}"))
        assert_refused(answer, 431, "headers_too_large", "limits.headers")
        await assert_goes_on(p, fake)


async def test_headers_below_the_limit_are_fine(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, limits={"headers": LIMIT}) as p:
        raw = await p.raw(http("/health", b"", "x: " + "y" * (LIMIT - 500), method="GET"))
        assert parsed(raw).status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"rubbish\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS to a plain port
        b"\x00" * 100,
        b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
        b"BREW /health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"GET /health HTTP/1.1\r\nhost: x\r\nbroken\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx : y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: a\r\n b\r\n\r\n",  # obs-fold
        b"GET /health HTTP/1.1\r\nhost: x\r\n folded: b\r\n\r\n",
        http(CHAT, b"", "content-length: 5", "content-length: 6") + b"123456",
        http(CHAT, b"", "content-length: 5", "transfer-encoding: chunked") + b"0\r\n\r\n",
        http(CHAT, b"", "content-length: -1"),
        http(CHAT, b"", "content-length: +5") + b"12345",
        http(CHAT, b"", "content-length: 0x5") + b"12345",
        http(CHAT, b"", "transfer-encoding: chunked, gzip"),
        http(CHAT, b"", "transfer-encoding: identity"),
    ],
)
async def test_what_is_not_well_formed_http(
    fake: FakeVllm, proxied: Start, request_bytes: bytes
) -> None:
    async with proxied(fake) as p:
        raw = await p.raw(request_bytes)
        assert raw.count(b"HTTP/1.") == 1, raw
        assert_refused(parsed(raw), 400, "bad_request")
        await assert_goes_on(p, fake)


@pytest.mark.parametrize(
    "body",
    [
        b"xyz\r\n",
        b"-5\r\nhello\r\n",
        b"5\r\nhelloX",
        b"fffffffffffffffff\r\n",
        b"5;\x00\r\nhello\r\n",
    ],
)
async def test_broken_chunks(
    fake: FakeVllm, proxied: Start, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr("lora_proxy.server.LINGER", 0.05)
    async with proxied(fake, timeouts={"client": 600.0}) as p:
        raw = await p.raw(http(CHAT, b"", "transfer-encoding: chunked") + body)
        assert raw.count(b"HTTP/1.") == 1, raw
        assert_refused(parsed(raw), 400, "bad_request")
        await assert_goes_on(p, fake)


async def test_broken_chunks_after_a_good_beginning(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, timeouts={"client": 600.0}) as p, p.connected() as (reader, writer):
        writer.write(http(CHAT, b"", "transfer-encoding: chunked", "expect: 100-continue"))
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b'10\r\n{"model":"sql"  \r\nxyz\r\n')
        assert_refused(parsed(await reader.readuntil(b"}}")), 400, "bad_request")
        await assert_goes_on(p, fake)


async def test_a_secret_in_a_broken_head_is_not_repeated(
    fake: FakeVllm, proxied: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "lora_proxy")
    async with proxied(fake) as p:
        for bad in (b"\x00", b"y" * 70_000):
            secret = b"GET /health HTTP/1.1\r\nhost: x\r\nauthorization: Bearer SECRET" + bad
            raw = await p.raw(secret + b"\r\n\r\n")
            assert parsed(raw).status in (400, 431)
            assert b"SECRET" not in raw
        assert "SECRET" not in caplog.text


async def test_a_body_cannot_smuggle_a_second_request(fake: FakeVllm, proxied: Start) -> None:
    smuggled = http("/v1/load_lora_adapter", b'{"lora_name":"x","lora_path":"/x"}')
    async with proxied(fake) as p:
        body = json.dumps(chat("tiny", "hi")).encode() + smuggled
        raw = await p.raw(http(CHAT, body))
        assert_refused(parsed(raw), 400, "invalid_json")
        raw = await p.raw(http("/v1/x", smuggled, "transfer-encoding : chunked"))
        assert parsed(raw).status == 400
        assert fake.loads == []
        await assert_goes_on(p, fake)


# --- paths and methods ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/v2/models",
        "/docs",
        "/openapi.json",
        "/adapters",
        "/adapters/sql",
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/scale_elastic_ep",
        "/server_info",
        "/reset_prefix_cache",
        "/v1/../sleep",
        "/v1/%2e%2e/sleep",
        "//sleep",
        "/v1/models/../../sleep",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_unknown_path_is_a_404(
    fake: FakeVllm, proxied: Start, path: str, method: str
) -> None:
    async with proxied(fake) as p:
        answer = parsed(await p.raw(http(path, b"{}", method=method)))
        assert_refused(answer, 404, "unknown_path")
        await assert_goes_on(p, fake)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/unload_lora_adapter/",
        "//v1//load_lora_adapter",
        "/v1/./load_lora_adapter",
        "/v1/x/../load_lora_adapter",
        "/v1/%6coad_lora_adapter",
        "/v1/load%5Flora%5fadapter",
        "/v1/LOAD_LORA_ADAPTER",
        "/%76%31/load_lora_adapter",
        "/v1/load_lora_adapter?x=1",
        "/v1/models/../load_lora_adapter",
        "/v1/future/load_lora_adapter/x",
        "/load_lora_adapter",
    ],
)
async def test_control_paths_are_fenced_however_they_are_spelt(
    fake: FakeVllm, proxied: Start, path: str
) -> None:
    body = b'{"lora_name":"x","lora_path":"/x"}'
    async with proxied(fake) as p:
        for method in ("POST", "GET", "PUT"):
            answer = parsed(await p.raw(http(path, body, method=method)))
            assert_refused(answer, 403, "control_path")
        assert fake.loads == fake.unloads == []
        await assert_goes_on(p, fake)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/%256coad_lora_adapter",
        "/v1/load_lora_adapter%00",
        "/v1/load_lora_adapter;x",
        "/v1/load_lora_adapter%3fx",
        "/v1/load_lora_adapter#x",
        "/v1\\load_lora_adapter",
        "/v1/%5cload_lora_adapter",
        "/v1%2fload_lora_adapter",
        "/v1/..%2fv1/load_lora_adapter",
        "/../v1/load_lora_adapter",
        "/v1/\xfe",
        "/v1/%ff",
        "/v1/%zz",
        "http://127.0.0.1/v1/load_lora_adapter",
        "/v1/x?\xfe",
    ],
)
async def test_an_ambiguous_path_is_refused(fake: FakeVllm, proxied: Start, path: str) -> None:
    async with proxied(fake) as p:
        answer = parsed(await p.raw(http(path, b'{"lora_name":"x","lora_path":"/x"}')))
        assert answer.status in (400, 403)
        assert answer.code in ("invalid_path", "bad_request", "control_path")
        await assert_goes_on(p, fake)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", CHAT, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/sql", "GET, HEAD"),
        ("DELETE", "/health", "GET, HEAD"),
        ("OPTIONS", "/v1/future", "DELETE, GET, HEAD, PATCH, POST, PUT"),
        ("TRACE", "/v1/future", "DELETE, GET, HEAD, PATCH, POST, PUT"),
    ],
)
async def test_a_wrong_method_is_a_405_that_names_the_right_ones(
    fake: FakeVllm, proxied: Start, method: str, path: str, allow: str
) -> None:
    async with proxied(fake) as p:
        answer = parsed(await p.raw(http(path, method=method)))
        assert_refused(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == allow
        await assert_goes_on(p, fake)


async def test_connect_is_refused(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p, p.connected() as (reader, writer):
        writer.write(b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = parsed(await reader.readuntil(b"}}"))
        assert answer.status == 400
        await assert_goes_on(p, fake)


async def test_an_upgrade_is_not_forwarded(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        raw = await p.raw(
            b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        assert parsed(raw).status == 404  # the upstream's word
        assert "upgrade" not in fake.requests[-1].headers


async def test_strict_paths_forward_listed_ones_only(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, strict_paths=True) as p:
        answer = await p.post("/v1/future", {"model": "sql"})
        assert_refused(answer, 404, "unknown_path")
        await assert_goes_on(p, fake)


# --- many at once, and the other API's shape -----------------------------------------------


async def test_bad_and_good_requests_side_by_side(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, adapters=ADAPTERS) as p:

        async def good() -> int:
            return (await p.ask("sql")).status

        async def bad(data: bytes) -> int:
            return parsed(await p.raw(data)).status

        work: list[Any] = []
        for _ in range(20):
            work += [good(), bad(b"rubbish\r\n\r\n"), bad(http(CHAT, b"[]")), bad(http("/x"))]
        found = await asyncio.gather(*work)
        assert [found[kind::4] for kind in range(4)] == [
            [200] * 20,
            [400] * 20,
            [400] * 20,
            [404] * 20,
        ]


async def test_a_refused_request_does_not_cost_the_connection(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        bad = http(CHAT, b"[]").replace(b"connection: close\r\n", b"")
        raw = await p.raw(bad + bad + http("/health", method="GET"))
        assert raw.count(b"HTTP/1.1 400") == 2
        assert raw.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"[]", 400, "invalid_request_error"),
        (b'{"model":7}', 400, "invalid_request_error"),
        (b'{"model":"nope"}', 404, "not_found_error"),
        (b'{"x":"' + b"x" * 2000 + b'"}', 413, "request_too_large"),
    ],
)
async def test_errors_on_messages_have_anthropics_shape(
    fake: FakeVllm, proxied: Start, body: bytes, status: int, kind: str
) -> None:
    async with proxied(fake, limits={"body": 1000}) as p:
        for path in (MESSAGES, "/v1/messages/count_tokens", "/v1//messages"):
            answer = await p.post(path, body)
            assert answer.status == status
            assert answer.json["type"] == "error"
            assert answer.json["error"]["type"] == kind
            assert set(answer.json["error"]) == {"type", "message"}
        await assert_goes_on(p, fake)


async def test_a_client_that_only_connects_is_no_matter(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        async with p.connected(), p.connected() as (_, writer):
            writer.write(b"POST /v1/chat/compl")
            await assert_goes_on(p, fake)
        await until(lambda: not p.members[0].in_flight)
