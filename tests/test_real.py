"""The main job on a real vLLM: an unchanged OpenAI client, the proxy, and the right adapter.

Base answers are compared only while no adapter's request runs: this CPU build of vLLM answers
a base request that shares a batch with adapters' from one of these adapters.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
from conftest import VLLM_PYTHON, Models
from openai.types.chat import ChatCompletion
from proxied import PATIENCE, Proxied, Start, until
from vllm_server import VllmServer

from lora_proxy.types import Adapter

SECONDS = 60.0  # for one answer of a server that shares two cores


@pytest.fixture
async def through(real_vllm: VllmServer, models: Models, proxied: Start) -> AsyncIterator[Proxied]:
    """A proxy before the real server, which afterwards holds what it held before."""
    adapters = [
        Adapter("sql", str(models.adapters / "sql"), aliases=("gpt-3.5-turbo",)),
        Adapter("pirate", str(models.adapters / "pirate")),
        Adapter("rank128", str(models.adapters / "rank128")),
        Adapter("untrained", str(models.adapters / "untrained")),
        Adapter("dora", str(models.adapters / "dora")),
        Adapter("corrupt", str(models.adapters / "corrupt")),
        Adapter("nowhere", str(models.adapters / "nowhere")),
    ]
    async with proxied(real_vllm, adapters=adapters) as p:
        yield p
        await unload_all(real_vllm.url)


async def unload_all(url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        for card in await cards(session):
            if card["parent"] is not None:
                name = {"lora_name": card["id"]}
                async with session.post("/v1/unload_lora_adapter", json=name) as answer:
                    assert answer.status == 200


async def cards(session: aiohttp.ClientSession) -> list[dict[str, str | None]]:
    async with session.get("/v1/models") as answer:
        data: list[dict[str, str | None]] = (await answer.json())["data"]
        return data


async def gauge(url: str, name: str) -> float:
    """One of vLLM's own gauges, summed over its labels."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))


@pytest.fixture
async def client(through: Proxied) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{through.url}/v1", api_key="anything", timeout=SECONDS, max_retries=0
    ) as made:
        yield made


async def say(client: openai.AsyncOpenAI, model: str, prompt: str) -> ChatCompletion:
    return await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=24,
    )


def text_of(answer: ChatCompletion) -> str:
    return (answer.choices[0].message.content or "").strip()


# --- names ------------------------------------------------------------------------------


async def test_list_shows_public_names_and_no_paths(
    client: openai.AsyncOpenAI, through: Proxied, models: Models
) -> None:
    listed = {card.id: card.model_dump() for card in (await client.models.list()).data}
    assert {"tiny", "sql", "gpt-3.5-turbo", "pirate"} <= listed.keys()
    assert listed["tiny"]["parent"] is None
    assert {listed[name]["parent"] for name in ("sql", "gpt-3.5-turbo", "pirate")} == {"tiny"}
    assert str(models.base.parent) not in (await through.get("/v1/models")).body.decode()
    assert (await client.models.retrieve("sql")).id == "sql"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nope")


@pytest.mark.parametrize(
    ("model", "who"),
    [("tiny", "base"), ("sql", "sql"), ("pirate", "pirate"), ("gpt-3.5-turbo", "sql")],
)
async def test_chat(client: openai.AsyncOpenAI, models: Models, model: str, who: str) -> None:
    answer = await say(client, model, models.prompt)
    assert text_of(answer) == models.answers[who]
    assert answer.model == model
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize(("model", "who"), [("tiny", "base"), ("gpt-3.5-turbo", "sql")])
async def test_chat_stream(
    client: openai.AsyncOpenAI, models: Models, model: str, who: str
) -> None:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": models.prompt}],
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {model}
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said.strip() == models.answers[who]
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None


async def test_completions(client: openai.AsyncOpenAI) -> None:
    """The same greedy prompt gives the same text, whole or streamed, and the public name."""
    options = {"prompt": "I write", "temperature": 0, "max_tokens": 8}
    whole = await client.completions.create(model="sql", **options)  # type: ignore[call-overload]  # as a dict
    stream = await client.completions.create(model="sql", stream=True, **options)  # type: ignore[call-overload]  # as a dict
    pieces = [piece async for piece in stream]
    assert whole.model == "sql"
    assert {piece.model for piece in pieces} == {"sql"}
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


async def test_a_sync_client(through: Proxied, models: Models) -> None:
    def talk() -> str:
        with openai.OpenAI(base_url=f"{through.url}/v1", api_key="x", max_retries=0) as client:
            return text_of(
                client.chat.completions.create(
                    model="pirate",
                    messages=[{"role": "user", "content": models.prompt}],
                    temperature=0,
                    max_tokens=24,
                    timeout=SECONDS,
                )
            )

    assert await asyncio.to_thread(talk) == models.answers["pirate"]


# --- errors, as the SDK raises them -------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "raised", "code", "words"),
    [
        ("sqll", openai.NotFoundError, "model_not_found", "closest: 'sql'"),
        ("nowhere", openai.NotFoundError, "adapter_not_found", "finds no adapter at"),
        ("rank128", openai.UnprocessableEntityError, "adapter_rank_too_high", "128"),
        ("untrained", openai.UnprocessableEntityError, "adapter_untrained", "lora_B"),
        ("dora", openai.UnprocessableEntityError, "adapter_invalid", "DoRA"),
        ("corrupt", openai.UnprocessableEntityError, "adapter_invalid", "safetensors"),
    ],
)
async def test_an_error_has_its_type_and_names_the_next_step(
    client: openai.AsyncOpenAI,
    models: Models,
    model: str,
    raised: type[openai.APIStatusError],
    code: str,
    words: str,
) -> None:
    with pytest.raises(raised, match=re.escape(words)) as caught:
        await say(client, model, models.prompt)
    assert caught.value.code == code
    assert caught.value.response.headers["x-lora-proxy-error"] == code
    assert "@" not in caught.value.message.partition("Error code")[0]


async def test_vllms_own_error_keeps_its_status_and_gets_the_public_name(
    client: openai.AsyncOpenAI, models: Models
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="gpt-3.5-turbo", messages=[{"role": "user", "content": models.prompt}], top_p=7
        )
    assert "x-lora-proxy-error" not in caught.value.response.headers


async def test_the_fence_holds_before_a_real_server(
    through: Proxied, real_vllm: VllmServer, models: Models
) -> None:
    load = {"lora_name": "evil", "lora_path": str(models.adapters / "sql")}
    for path in (
        "/v1/load_lora_adapter",
        "//v1//load_lora_adapter",
        "/v1/x/../load_lora_adapter",
        "/v1/%6coad_lora_adapter",
        "/v1/load_lora_adapter/",
    ):
        answer = await through.post(path, load)
        assert answer.status in (400, 403), path
    async with aiohttp.ClientSession(real_vllm.url) as session:
        assert "evil" not in {card["id"] for card in await cards(session)}


# --- many at once -------------------------------------------------------------------------


async def test_two_adapters_interleaved_from_20_clients(through: Proxied, models: Models) -> None:
    async def one(number: int) -> list[tuple[str, str, str]]:
        said = []
        async with openai.AsyncOpenAI(
            base_url=f"{through.url}/v1", api_key="x", timeout=SECONDS, max_retries=0
        ) as client:
            for turn in range(4):
                model = ("sql", "pirate")[(number + turn) % 2]
                answer = await say(client, model, models.prompt)
                said.append((model, answer.model, text_of(answer)))
        return said

    async with asyncio.timeout(SECONDS * 3):
        everything = await asyncio.gather(*map(one, range(20)))
    for model, named, said in (triple for row in everything for triple in row):
        assert (named, said) == (model, models.answers[model])
    loads = await through.samples("lora_proxy_adapter_loads_total")
    assert loads == {("pirate", "ok", "gpu-0"): 1, ("sql", "ok", "gpu-0"): 1}


async def test_200_first_requests_make_one_load(through: Proxied, models: Models) -> None:
    """50 of them leave before the adapter is there; the other 150 are answered."""
    options = {"temperature": 0, "max_tokens": 24}
    tasks = [
        asyncio.ensure_future(through.ask("sql", models.prompt, **options)) for _ in range(200)
    ]
    member = through.members[0]
    await until(lambda: member.slots.waiting + member.in_flight >= 100, "many waiting requests")
    for task in tasks[:50]:
        task.cancel()
    async with asyncio.timeout(SECONDS * 3):
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    right = [a for a in answers if not isinstance(a, BaseException)]
    assert len(right) >= 150
    assert {a.status for a in right} == {200}
    assert {a.json["choices"][0]["message"]["content"].strip() for a in right} == {
        models.answers["sql"]
    }
    assert await through.samples("lora_proxy_adapter_loads_total") == {("sql", "ok", "gpu-0"): 1}
    await through.idle()


# --- leaving --------------------------------------------------------------------------------


async def test_a_client_that_leaves_aborts_the_generation(
    client: openai.AsyncOpenAI, real_vllm: VllmServer, models: Models
) -> None:
    stream = await client.chat.completions.create(
        model="sql",
        messages=[{"role": "user", "content": models.prompt}],
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    await anext(aiter(stream))
    assert await gauge(real_vllm.url, "vllm:num_requests_running") == 1
    made = await gauge(real_vllm.url, "vllm:generation_tokens_total")
    await stream.close()
    async with asyncio.timeout(PATIENCE):
        while await gauge(real_vllm.url, "vllm:num_requests_running"):  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.1)
    # It was broken off, and did not just come to its end.
    assert await gauge(real_vllm.url, "vllm:generation_tokens_total") - made < 800


# --- a server of its own ------------------------------------------------------------------


@pytest.fixture
def own_vllm(models: Models, tmp_path: Path) -> Iterator[Callable[..., VllmServer]]:
    """Starts a server that the test may kill."""
    servers: list[VllmServer] = []

    def start(**options: object) -> VllmServer:
        server = VllmServer(VLLM_PYTHON, models.base, log=tmp_path / "vllm.log", **options)  # type: ignore[arg-type]  # its own flags
        servers.append(server)
        server.start()
        server.wait_ready()
        return server

    yield start
    for server in servers:
        server.kill()


async def test_killed_and_started_again_the_client_sees_nothing(
    own_vllm: Callable[..., VllmServer], models: Models, proxied: Start
) -> None:
    """And a module of --lora-modules is used as it is, before and after."""
    sql, pirate = str(models.adapters / "sql"), str(models.adapters / "pirate")
    server = await asyncio.to_thread(own_vllm, lora_modules={"theirs": models.adapters / "sql"})
    async with proxied(server, adapters={"sql": sql, "pirate": pirate}) as p:
        options = {"temperature": 0, "max_tokens": 24}
        for model in ("sql", "pirate"):
            answer = await p.ask(model, models.prompt, **options)
            said = answer.json["choices"][0]["message"]["content"].strip()
            assert (said, answer.json["model"]) == (models.answers[model], model)
        assert await p.samples("lora_proxy_adapter_loads_total") == {
            ("pirate", "ok", "gpu-0"): 1,
            ("sql", "adopted", "gpu-0"): 1,
        }
        server.kill()
        server.start()
        await asyncio.to_thread(server.wait_ready)
        for model in ("pirate", "sql"):
            answer = await p.ask(model, models.prompt, **options)
            assert answer.status == 200, answer.body
            said = answer.json["choices"][0]["message"]["content"].strip()
            assert (said, answer.json["model"]) == (models.answers[model], model)
        loads = await p.samples("lora_proxy_adapter_loads_total")
        assert loads["pirate", "ok", "gpu-0"] == 2
