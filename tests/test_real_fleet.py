"""A fleet of two real vLLM servers: one is killed under load, and both share eight adapters.

Only adapters are asked, never the base model: this CPU build of vLLM answers a base request
that shares a batch with adapters' from one of these adapters.
"""

import asyncio
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import aiohttp
import orjson
import pytest
from conftest import VLLM_PYTHON, Models
from proxied import CHAT, Proxied, Start, chat, until
from vllm_server import VllmServer

from lora_proxy.settings import RetrySettings, RoutingSettings
from lora_proxy.types import Adapter

SECONDS = 120.0  # for all that is under way at once, on two cores
SLOTS = 2  # adapters that one server computes at once: --max-loras
MEMORY = 4  # adapters that one server has room for: --max-cpu-loras


@pytest.fixture(scope="module")
def pair(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmServer, VllmServer]]:
    logs = tmp_path_factory.mktemp("vllm")
    pair = (_server(models, logs / "0.log"), _server(models, logs / "1.log"))
    yield pair
    for server in pair:
        server.kill()


@pytest.fixture
def servers(pair: tuple[VllmServer, VllmServer]) -> tuple[VllmServer, VllmServer]:
    """Two servers that a test may kill."""
    for server in pair:
        if not server.running:
            server.start()
    for server in pair:
        server.wait_ready()
    return pair


def _server(models: Models, log: Path) -> VllmServer:
    return VllmServer(VLLM_PYTHON, models.base, log=log, max_loras=SLOTS, max_cpu_loras=MEMORY)


@dataclass(frozen=True, slots=True)
class Registry:
    """Eight adapters, each in a folder of its own.

    Attributes:
        adapters: What the proxy is told; the first is the one most asked for.
        says: What each of them answers.
    """

    adapters: Sequence[Adapter]
    says: Mapping[str, str]


@pytest.fixture(scope="module")
def registry(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Copies of the two that are trained, by turns: so who answers can be told from the other."""
    folder = tmp_path_factory.mktemp("adapters")
    trained = {f"{name}-{n}": name for n in range(4) for name in ("sql", "pirate")}
    for copy, name in trained.items():
        shutil.copytree(models.adapters / name, folder / copy)
    return Registry(
        [Adapter(copy, str(folder / copy)) for copy in trained],
        {copy: models.answers[name] for copy, name in trained.items()},
    )


async def unload_all(servers: Sequence[VllmServer]) -> None:
    """So that what comes next starts from nothing."""
    for server in servers:
        async with aiohttp.ClientSession(server.url) as session:
            async with session.get("/v1/models") as answer:
                cards = (await answer.json())["data"]
            for card in cards:
                if card["parent"] is not None:
                    name = {"lora_name": card["id"]}
                    async with session.post("/v1/unload_lora_adapter", json=name) as answer:
                        assert answer.status == 200


# --- kill -9 ---------------------------------------------------------------------------------

LENGTH = 160  # tokens of each answer: some seconds for a hundred at once
End = Literal["complete", "error event", "cut off"]


@dataclass(slots=True)
class Asked:
    """One request, while it is under way and after.

    Attributes:
        adapter: Its `model`.
        upstream: Who answers, once the answer has begun.
        end: How it ended.
        text: What was said.
    """

    adapter: str
    upstream: str = ""
    end: End | None = None
    text: str = ""

    async def stream(self, p: Proxied, prompt: str) -> None:
        events: list[dict[str, Any] | str] = []
        body = orjson.dumps(_long(self.adapter, prompt, stream=True))
        try:
            async with p.session.post(
                p.url + CHAT, data=body, headers={"content-type": "application/json"}, **_PATIENT
            ) as answer:
                assert answer.status == 200, await answer.read()
                self.upstream = answer.headers["x-lora-proxy-upstream"]
                events += [_event(line) async for line in answer.content if line.strip()]
        except aiohttp.ClientPayloadError:
            self.end = "cut off"
            return
        self._judge(events)

    def _judge(self, events: Sequence[dict[str, Any] | str]) -> None:
        """A body that has come to its proper end says whether the answer has."""
        *said, last = events
        pieces = [e for e in said if isinstance(e, dict)]
        assert not any("error" in piece for piece in pieces), "an error that is not the last word"
        choices = [choice for piece in pieces for choice in piece["choices"]]
        self.text = "".join(choice["delta"].get("content") or "" for choice in choices)
        if last == "[DONE]":
            assert choices[-1]["finish_reason"] == "length"
            assert pieces[-1]["usage"]["completion_tokens"] == LENGTH
            self.end = "complete"
        else:
            assert isinstance(last, dict)
            assert last["error"]["code"] == "upstream_closed"
            assert "[DONE]" not in said
            self.end = "error event"

    async def whole(self, p: Proxied, prompt: str) -> None:
        answer = await p.post(CHAT, _long(self.adapter, prompt), **_PATIENT)
        assert answer.status == 200, answer.body
        assert answer.json["usage"]["completion_tokens"] == LENGTH
        assert answer.json["model"] == self.adapter
        self.upstream = answer.headers["x-lora-proxy-upstream"]
        self.text = answer.json["choices"][0]["message"]["content"]
        self.end = "complete"


_PATIENT: dict[str, Any] = {"timeout": aiohttp.ClientTimeout(total=SECONDS)}


def _long(adapter: str, prompt: str, **fields: object) -> dict[str, object]:
    """A question whose answer goes on after what the adapter has to say."""
    if fields.get("stream"):
        fields["stream_options"] = {"include_usage": True}
    return chat(adapter, prompt, temperature=0, max_tokens=LENGTH, ignore_eos=True, **fields)


def _event(line: bytes) -> dict[str, Any] | str:
    assert line.startswith(b"data: "), line
    data = line.removeprefix(b"data: ").strip()
    return "[DONE]" if data == b"[DONE]" else cast("dict[str, Any]", orjson.loads(data))


async def test_one_of_two_is_killed_under_load_and_comes_back(
    servers: tuple[VllmServer, VllmServer], registry: Registry, models: Models, proxied: Start
) -> None:
    """What was not answered is answered by the other; what had begun ends as broken."""
    adapters = registry.adapters[:4]
    async with proxied(
        *servers,
        adapters=adapters,
        upstream={"max_loras": SLOTS, "max_cpu_loras": MEMORY},
        probe_interval=0.5,
        retry=RetrySettings(budget=1.0, replay_started=True),
    ) as p:
        names = [adapter.name for adapter in adapters]
        streams = [Asked(names[n % 4]) for n in range(50)]
        wholes = [Asked(names[n % 4]) for n in range(50)]
        tasks = [asyncio.ensure_future(one.stream(p, models.prompt)) for one in streams]
        tasks += [asyncio.ensure_future(one.whole(p, models.prompt)) for one in wholes]
        victim, other = p.members

        def begun() -> list[Asked]:
            return [one for one in streams if one.upstream == victim.name and one.end is None]

        await until(lambda: len(begun()) >= 5 and not victim.slots.waiting, "streams under way")
        holders = {m.name: len(m.slots.residents) for m in p.members}
        struck, at_work = begun(), victim.in_flight
        unanswered = sum(one.end is None for one in wholes)
        await asyncio.to_thread(servers[0].kill)

        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*tasks)

        # The adapters were spread, and the blow fell in the midst of both kinds of requests.
        assert min(holders.values()) >= 1
        assert unanswered >= 25
        assert at_work > len(struck)
        # Each begun stream of the killed server was broken off, and says so; all else is whole.
        ends = Counter(one.end for one in streams)
        broken = [one for one in streams if one.end != "complete"]
        assert ends["error event"] + ends["cut off"] == len(broken)
        assert {one.upstream for one in broken} == {victim.name}
        assert all(one in broken for one in struck)
        assert ends["error event"] >= 1, ends
        for one in (*streams, *wholes):
            if one.end == "complete":
                assert one.text.strip().startswith(registry.says[one.adapter]), one
        retried = await p.samples("lora_proxy_retries_total")
        assert retried["upstream_closed", victim.name] >= at_work - len(broken)

        # --- and it comes back, with no operator
        await until(lambda: not victim.usable, "the end of what was killed")
        assert (await p.ask(names[0], models.prompt)).headers["x-lora-proxy-upstream"] == other.name
        servers[0].start()
        await asyncio.to_thread(servers[0].wait_ready)
        await until(lambda: victim.usable, "the return of what was killed")
        assert not victim.slots.residents, "a server that restarted holds nothing"
        await _is_used_again(p, victim.name, registry, models)
    await unload_all(servers)


async def _is_used_again(p: Proxied, name: str, registry: Registry, models: Models) -> None:
    """Traffic for adapters finds its way back; the other, which holds them, gives some away."""
    adapters = list(registry.says)[:4]

    async def one(adapter: str) -> str:
        answer = await p.ask(adapter, models.prompt, temperature=0, max_tokens=24)
        assert answer.status == 200, answer.body
        said = answer.json["choices"][0]["message"]["content"].strip()
        assert said == registry.says[adapter]
        return answer.headers["x-lora-proxy-upstream"]

    async with asyncio.timeout(SECONDS):
        while True:
            answered = Counter(await asyncio.gather(*map(one, adapters * 12)))
            assert answered.total() == 48
            if answered[name]:
                return


# --- more adapters than slots ----------------------------------------------------------------

CLIENTS, REQUESTS = 12, 400


@dataclass(frozen=True, slots=True)
class Cost:
    """What one policy cost for the traffic.

    Attributes:
        loads: By which all upstreams together came to their adapters.
        p95: Seconds within which 95 of 100 requests were answered.
    """

    loads: int
    p95: float


def zipf(names: Sequence[str]) -> list[str]:
    """The same for each policy: the second adapter is asked for half as often as the first..."""
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    return random.Random(1).choices(names, weights, k=REQUESTS)


async def warm_up(servers: Sequence[VllmServer]) -> None:
    """A new process is slow at first, which is no policy's fault."""
    body = chat("tiny", max_tokens=8)
    async with aiohttp.ClientSession() as session:
        for server in servers:
            for _ in range(3):
                async with session.post(server.url + CHAT, json=body) as answer:
                    assert answer.status == 200


async def cost(
    policy: str, servers: Sequence[VllmServer], registry: Registry, kept: int, proxied: Start
) -> Cost:
    await unload_all(servers)
    await warm_up(servers)
    latencies: list[float] = []
    traffic = iter(zipf(list(registry.says)))
    async with proxied(
        *servers,
        adapters=registry.adapters,
        upstream={"max_loras": SLOTS, "max_cpu_loras": kept},
        routing=RoutingSettings(policy=policy),  # type: ignore[arg-type]  # one of its names
    ) as p:

        async def client() -> None:
            for adapter in traffic:
                started = time.perf_counter()
                answer = await p.post(CHAT, chat(adapter, temperature=0, max_tokens=8), **_PATIENT)
                latencies.append(time.perf_counter() - started)
                assert answer.status == 200, answer.body

        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
        loads = await p.samples("lora_proxy_adapter_loads_total")
    assert {result for _, result, _ in loads} == {"ok"}
    assert len(latencies) == REQUESTS
    return Cost(int(sum(loads.values())), sorted(latencies)[math.ceil(0.95 * REQUESTS) - 1])


async def test_affinity_spares_loads_where_adapters_must_take_turns(
    servers: tuple[VllmServer, VllmServer], registry: Registry, proxied: Start
) -> None:
    """Half of the adapters find no place, so even the best order has to load again and again."""
    affinity = await cost("lora-affinity", servers, registry, SLOTS, proxied)
    robin = await cost("round-robin", servers, registry, SLOTS, proxied)
    await unload_all(servers)
    assert affinity.loads * 4 <= robin.loads * 3, (affinity, robin)
