"""Public names that lead to several: split, sticky, with something to fall back to, mirrored."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping

import pytest
from fake_vllm import CLOSE, FakeVllm, OnDisk, Reply
from proxied import CHAT, Answer, Start, chat, until

from lora_proxy.types import Adapter, Route

SPLIT = (("sql", 75.0), ("pirate", 25.0))


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    async with FakeVllm(base="big") as server:
        yield server


def speaker(answer: Answer) -> str:
    """The adapter, or base model, that answered."""
    said = str(answer.json["choices"][0]["message"]["content"])
    return said.split()[2].rstrip(".").partition("@")[0]


# --- split ---------------------------------------------------------------------------------


async def test_each_gets_its_part(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, routes=(Route("support", SPLIT),)) as p:
        answers = [await p.ask("support") for _ in range(200)]
        counts = Counter(map(speaker, answers))
        assert set(counts) == {"sql", "pirate"}
        assert 20 <= counts["pirate"] <= 85  # five standard deviations around 50
        assert {answer.json["model"] for answer in answers} == {"support"}


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_have_the_routes_name(
    fake: FakeVllm, proxied: Start, *, stream: bool
) -> None:
    async with proxied(fake, routes=(Route("support", (("sql", 1.0),)),)) as p:
        answer = await p.ask("support", stream=stream)
        assert b'"model":"support"' in answer.body
        assert b'"model":"sql' not in answer.body
        fake.inject(Reply(400, {"error": {"message": f"{fake.lora_names[0]} says no"}}), path=CHAT)
        assert (await p.ask("support")).json["error"]["message"] == "support says no"


async def test_metrics_are_the_adapters(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, routes=(Route("support", (("sql", 1.0),)),)) as p:
        await p.ask("support")
        requests = await p.samples("lora_proxy_requests_total")
        assert requests == {("sql", "200", "/v1/chat/completions", "gpu-0"): 1}


async def test_the_adapters_own_fields_are_filled_in(fake: FakeVllm, proxied: Start) -> None:
    adapter = Adapter("sql", "/adapters/sql", defaults={"temperature": 0.5})
    routes = (Route("support", (("sql", 1.0),)),)
    async with proxied(fake, adapters=[adapter], routes=routes) as p:
        await p.ask("support")
        assert fake.requests_to(CHAT)[0].json["temperature"] == 0.5


async def test_the_list_of_models_has_it(fake: FakeVllm, proxied: Start) -> None:
    routes = (Route("support", SPLIT), Route("secret", SPLIT, hidden=True))
    async with proxied(fake, routes=routes) as p:
        listing = (await p.get("/v1/models")).json["data"]
        assert [one["id"] for one in listing] == ["tiny", "sql", "pirate", "support"]
        assert (await p.ask("secret")).status == 200


# --- sticky --------------------------------------------------------------------------------

EVEN = (("sql", 1.0), ("pirate", 1.0))


async def test_a_user_stays(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, routes=(Route("support", EVEN, sticky="user"),)) as p:
        homes: dict[str, str] = {}
        for _ in range(3):
            for number in range(20):
                user = f"user-{number}"
                home = speaker(await p.ask("support", user=user))
                assert homes.setdefault(user, home) == home
        assert set(homes.values()) == {"sql", "pirate"}
        anybody = {speaker(await p.ask("support")) for _ in range(40)}
        assert anybody == {"sql", "pirate"}  # nothing to go by


async def test_a_session_stays(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, routes=(Route("support", EVEN, sticky="x-session-id"),)) as p:

        async def home(session: str) -> str:
            headers: Mapping[str, str] = {"X-Session-Id": session}
            return speaker(await p.post(CHAT, chat("support"), headers=headers))

        first = [await home(str(number)) for number in range(20)]
        assert set(first) == {"sql", "pirate"}
        assert [await home(str(number)) for number in range(20)] == first


# --- fallback ------------------------------------------------------------------------------


async def test_what_is_not_there_is_made_up_for(fake: FakeVllm, proxied: Start) -> None:
    fake.disk["/adapters/sql"] = None
    fake.disk["/adapters/pirate"] = OnDisk(refusal="vLLM does not yet support DoRA.")
    route = Route("support", (("sql", 1.0),), fallback=("pirate", "tiny"))
    async with proxied(fake, routes=(route,)) as p:
        answer = await p.ask("support")
        assert (answer.status, speaker(answer), answer.json["model"]) == (200, "tiny", "support")
        requests = await p.samples("lora_proxy_requests_total")
        assert requests == {("tiny", "200", "/v1/chat/completions", "gpu-0"): 1}
        retries = await p.samples("lora_proxy_retries_total")
        assert retries == {("fallback", "gpu-0"): 2}


async def test_the_first_that_can_answers(fake: FakeVllm, proxied: Start) -> None:
    fake.disk["/adapters/sql"] = None
    route = Route("support", (("sql", 1.0),), fallback=("pirate", "tiny"))
    async with proxied(fake, routes=(route,)) as p:
        assert speaker(await p.ask("support")) == "pirate"


async def test_the_last_ones_error_is_the_answer(fake: FakeVllm, proxied: Start) -> None:
    fake.disk["/adapters/sql"] = fake.disk["/adapters/pirate"] = None
    route = Route("support", (("sql", 1.0),), fallback=("pirate",))
    async with proxied(fake, routes=(route,)) as p:
        answer = await p.ask("support")
        assert (answer.status, answer.code) == (404, "adapter_not_found")
        assert "pirate" in answer.json["error"]["message"]


async def test_a_fallback_on_another_base_model_while_the_first_is_down(
    fake: FakeVllm, other: FakeVllm, proxied: Start
) -> None:
    route = Route("support", (("tiny", 1.0),), fallback=("big",))
    async with proxied(fake, other, routes=(route,)) as p:
        assert speaker(await p.ask("support")) == "tiny"
        await fake.stop()
        answer = await p.ask("support")
        assert (speaker(answer), answer.headers["x-lora-proxy-upstream"]) == ("big", "gpu-1")
        await fake.start()


@pytest.mark.parametrize("status", [400, 500])
async def test_the_upstreams_own_errors_are_answers(
    fake: FakeVllm, proxied: Start, status: int
) -> None:
    route = Route("support", (("sql", 1.0),), fallback=("tiny",))
    async with proxied(fake, routes=(route,)) as p:
        fake.inject(Reply(status, b"no"), path=CHAT)
        assert (await p.ask("support")).status == status
        assert len(fake.requests_to(CHAT)) == 1


async def test_what_may_have_begun_does_not_fall_back(fake: FakeVllm, proxied: Start) -> None:
    route = Route("support", (("sql", 1.0),), fallback=("tiny",))
    async with proxied(fake, routes=(route,)) as p:
        fake.inject(CLOSE, path=CHAT)
        assert (await p.ask("support")).code == "upstream_closed"
        assert len(fake.requests_to(CHAT)) == 1


# --- mirror --------------------------------------------------------------------------------


def mirrored(sample: float = 1.0) -> tuple[Route, ...]:
    return (Route("support", (("sql", 1.0),), mirror="pirate", sample=sample),)


async def test_a_copy_is_asked_and_its_answer_dropped(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, routes=mirrored()) as p:
        answers = [await p.ask("support", f"question {n}") for n in range(3)]
        assert {speaker(answer) for answer in answers} == {"sql"}
        await until(lambda: len(fake.requests_to(CHAT)) == 6)
        asked = [seen.json for seen in fake.requests_to(CHAT)]
        copies = [one for one in asked if str(one["model"]).startswith("pirate@")]
        assert len(copies) == 3
        first = next(one for one in asked if str(one["model"]).startswith("sql@"))
        assert copies[0]["messages"] in [one["messages"] for one in asked if one not in copies]
        assert set(copies[0]) == set(first)
        await p.idle()
        assert await p.samples("lora_proxy_mirrored_total") == {("pirate", "sent"): 3}
        requests = await p.samples("lora_proxy_requests_total")
        assert {labels[0] for labels in requests if labels[2] == CHAT} == {"sql"}


@pytest.mark.parametrize("stream", [False, True])
async def test_its_failure_is_not_seen(fake: FakeVllm, proxied: Start, *, stream: bool) -> None:
    fake.disk["/adapters/pirate"] = None
    async with proxied(fake, routes=mirrored()) as p:
        for _ in range(3):
            assert (await p.ask("support", stream=stream)).status == 200
        await p.idle()
        await until(lambda: len(p.app.fleet._shared.tasks) == 1)  # the probe's
        assert await p.samples("lora_proxy_mirrored_total") == {("pirate", "failed"): 3}


async def test_nobody_waits_for_it_and_there_are_not_many_at_once(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, routes=mirrored(), mirror_limit=2) as p:
        await p.ask("sql")
        fake.load_gate.shut()  # the mirror's adapter does not come
        for _ in range(5):
            assert (await p.ask("support")).status == 200
        assert await p.samples("lora_proxy_mirrored_total") == {("pirate", "dropped"): 3}
        fake.load_gate.open()
        await until(lambda: len(fake.requests_to(CHAT)) == 8)
        await p.idle()


async def test_a_sample_is_a_sample(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, routes=mirrored(0.0)) as p:
        await asyncio.gather(*(p.ask("support") for _ in range(20)))
        assert await p.samples("lora_proxy_mirrored_total") == {}
    async with proxied(fake, routes=mirrored(0.5), mirror_limit=100) as p:
        await asyncio.gather(*(p.ask("support") for _ in range(100)))
        await p.idle()
        (count,) = (await p.samples("lora_proxy_mirrored_total")).values()
        assert 25 <= count <= 75


async def test_a_mirror_that_hangs_ends_with_the_proxy(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, routes=mirrored()) as p:
        await p.ask("sql")
        fake.load_gate.shut()
        assert (await p.ask("support")).status == 200
        await fake.until(lambda: fake.load_gate.waiting == 1)
        await p.app.stop()
