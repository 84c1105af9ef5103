"""Who may come in, and what never gets through: client keys and chat templates."""

import pytest
from fake_vllm import FakeVllm
from proxied import CHAT, Start, chat
from pydantic import SecretStr

KEYS = (SecretStr("k-one"), SecretStr("k-two"))


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer k-one"}, {"x-api-key": "k-two"}], ids=["openai", "claude"]
)
async def test_a_request_with_a_key_is_answered_and_the_key_stays_here(
    fake: FakeVllm, proxied: Start, headers: dict[str, str]
) -> None:
    async with proxied(fake, api_keys=KEYS, upstream={"api_key": "theirs"}) as p:
        answer = await p.post(CHAT, chat("sql"), headers=headers)
        assert answer.status == 200
        assert await p.samples("lora_proxy_auth_failures_total") == {}
    seen = fake.requests_to(CHAT)[0].headers
    assert seen.getall("authorization") == ["Bearer theirs"]
    assert "x-api-key" not in seen


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "missing"),
        ({"authorization": "Bearer nope"}, "unknown"),
        ({"x-api-key": ""}, "unknown"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/sql"), ("GET", "/v1/unheard-of")],
)
async def test_one_without_is_turned_away_before_anything_is_done(
    fake: FakeVllm, proxied: Start, method: str, path: str, headers: dict[str, str], reason: str
) -> None:
    async with proxied(fake, api_keys=KEYS) as p:
        before = len(fake.requests)
        answer = await p.request(method, path, data=b"never read" * 10, headers=headers)
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json["error"]["type"] == "authentication_error"
        assert await p.samples("lora_proxy_auth_failures_total") == {(reason,): 1}
    assert len(fake.requests) == before


async def test_anthropics_clients_are_turned_away_in_their_own_shape(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, api_keys=KEYS) as p:
        answer = await p.post("/v1/messages", chat("sql"))
        assert answer.status == 401
        assert answer.json["type"] == "error"
        assert answer.json["error"]["type"] == "authentication_error"


async def test_probes_and_scrapers_need_no_key(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, api_keys=KEYS) as p:
        for path in ("/health", "/ready", "/metrics"):
            assert (await p.get(path)).status == 200, path


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/v1/unheard-of"])
async def test_a_clients_chat_template_does_not_reach_vllm(
    fake: FakeVllm, proxied: Start, path: str
) -> None:
    body = chat("tiny", chat_template="{{ evil }}", chat_template_kwargs={"chat_template": "x"})
    async with proxied(fake) as p:
        await p.post(path, body)
        await p.post(path, {**body, "model": "sql"})
        await p.post(path, {key: body[key] for key in body if key != "model"})
        await p.post(path, body, headers={"content-type": "application/vnd.x+json"})
    for seen in fake.requests_to(path):
        assert b"evil" not in seen.body
        assert b'"chat_template"' not in seen.body
    assert len(fake.requests_to(path)) == 4


async def test_it_does_where_the_operator_allows_it(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, allow_chat_template=True) as p:
        answer = await p.ask("sql", chat_template="{{ theirs }}")
        assert answer.status == 400  # vLLM's own answer without --trust-request-chat-template
    assert b"{{ theirs }}" in fake.requests_to(CHAT)[0].body


async def test_rubbish_on_an_unknown_path_is_not_passed_on_as_json(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        answer = await p.post("/v1/unheard-of", b'{"chat_template": NaN}')
        assert (answer.status, answer.code) == (400, "invalid_json")
    assert not fake.requests_to("/v1/unheard-of")
