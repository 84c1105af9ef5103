"""Many upstreams: what is loaded ahead, who fits whom, who comes and who leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from adapter_folder import write
from fake_vllm import FakeVllm, OnDisk, Reply
from proxied import CHAT, Answer, Proxied, Start, chat, until
from pydantic import SecretStr

from lora_proxy.settings import RetrySettings, UpstreamSettings
from lora_proxy.types import Adapter

PIN = Adapter("sql", "/adapters/sql", pin=True)
PROBING = {"probe_interval": 0.01}


@pytest.fixture
async def fakes(fake: FakeVllm) -> AsyncIterator[Sequence[FakeVllm]]:
    """`gpu-0`, `gpu-1` and `gpu-2`."""
    async with FakeVllm() as other, FakeVllm() as third:
        yield fake, other, third


def settings(*servers: FakeVllm, first: int = 0, **more: Any) -> list[UpstreamSettings]:
    return [
        UpstreamSettings(f"gpu-{number}", server.url, **more)
        for number, server in enumerate(servers, first)
    ]


def by(answer: Answer) -> str:
    return answer.headers["x-lora-proxy-upstream"]


def held(fakes: Sequence[FakeVllm]) -> list[list[str]]:
    """Whose adapters each has."""
    return [[name.partition("@")[0] for name in fake.lora_names] for fake in fakes]


# --- loaded ahead --------------------------------------------------------------------------


async def test_what_is_pinned_is_loaded_everywhere_before_anybody_asks(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes, adapters=[PIN, Adapter("pirate", "/adapters/pirate")]) as p:
        await until(lambda: held(fakes) == [["sql"]] * 3)
        assert (await p.ask("sql")).status == 200
        assert sum(len(fake.loads) for fake in fakes) == 3


async def test_replicas_are_so_many_and_in_the_same_places_for_every_proxy(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    adapters = [Adapter(f"a{n}", f"/adapters/a{n}", replicas=2) for n in range(4)]
    places = []
    for _ in range(2):
        async with proxied(*fakes, adapters=adapters, upstream={"max_cpu_loras": 8}):
            await until(lambda: sum(len(fake.loras) for fake in fakes) == 8)
        places.append([sorted(names) for names in held(fakes)])
        for fake in fakes:
            fake.restart()
    assert places[0] == places[1]
    everywhere = [name for names in places[0] for name in names]
    assert {everywhere.count(f"a{n}") for n in range(4)} == {2}


@pytest.mark.parametrize("drop", [False, True])
async def test_a_restarted_upstream_gets_its_pins_again(
    fakes: Sequence[FakeVllm], proxied: Start, *, drop: bool
) -> None:
    """Also if it restarts between two probes, and none of them fails."""
    async with proxied(*fakes, adapters=[PIN], **PROBING):
        await until(lambda: held(fakes) == [["sql"]] * 3)
        for fake in fakes:
            fake.restart(drop_connections=drop)
        await until(lambda: held(fakes) == [["sql"]] * 3)


async def test_one_that_was_down_gets_its_pins(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, adapters=[PIN], **PROBING) as p:
        await until(lambda: fake.loras)
        await fake.stop()
        await until(lambda: not p.members[0].health.up)
        fake.restart()
        await fake.start()
        await until(lambda: fake.loras)
        assert (await p.ask("sql")).status == 200
        assert len(fake.loads) == 2


async def test_pins_are_never_evicted(fake: FakeVllm, proxied: Start) -> None:
    adapters = [PIN, *(Adapter(f"a{n}", f"/adapters/a{n}") for n in range(4))]
    upstream = {"max_cpu_loras": 2}
    async with proxied(fake, adapters=adapters, upstream=upstream, idle_ttl=0.02) as p:
        await until(lambda: fake.loras)
        for n in range(4):
            assert (await p.ask(f"a{n}")).status == 200
        await until(lambda: held([fake]) == [["sql"]])
        assert not any(name.startswith("sql@") for name in fake.unloads)


async def test_a_pin_that_cannot_be_loaded_is_no_torrent_of_calls(
    fake: FakeVllm, proxied: Start, caplog: pytest.LogCaptureFixture
) -> None:
    fake.disk["/adapters/sql"] = OnDisk(refusal="vLLM does not yet support DoRA.")
    async with proxied(fake, adapters=[PIN], **PROBING):
        await until(lambda: len(fake.requests_to("/health")) > 5)
        assert len(fake.loads) == 1
        said = [r for r in caplog.records if "not loaded ahead" in r.message]
        assert len(said) == 1


async def test_a_pinned_adapter_whose_base_nobody_has_is_said_once(
    fake: FakeVllm, proxied: Start, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Adapter("sql", "/adapters/sql", base="huge", pin=True)
    async with proxied(fake, adapters=[stranger], **PROBING) as p:
        await until(lambda: len(fake.requests_to("/health")) > 5)
        said = [r.message for r in caplog.records if "not loaded ahead" in r.message]
        assert len(said) == 1
        assert "'huge'" in said[0]
        answer = await p.ask("sql")
        assert (answer.status, answer.code) == (503, "no_upstream")
        assert "base_aliases" in answer.json["error"]["message"]


async def test_what_nobody_uses_is_unloaded_in_time(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, idle_ttl=0.1) as p:
        await p.ask("sql")
        await fake.until(lambda: not fake.loras)
        unloads = await p.samples("lora_proxy_adapter_unloads_total")
        assert unloads == {("sql", "idle", "gpu-0"): 1}
        assert (await p.ask("sql")).status == 200


async def test_what_is_in_use_is_not_idle(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, idle_ttl=0.02) as p:
        fake.answer_gate.shut()
        task = asyncio.create_task(p.ask("sql"))
        await fake.until(lambda: fake.running == 1)
        await asyncio.sleep(0.1)
        assert fake.unloads == []
        fake.answer_gate.open()
        assert (await task).status == 200


async def test_a_warm_up_comes_before_the_first_client(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, warm_up=True, upstream={"api_key": "k"}) as p:
        fake.answer_gate.shut()
        task = asyncio.create_task(p.ask("sql"))
        await fake.until(lambda: fake.running == 1)
        (warm,) = fake.requests_to("/v1/completions")
        assert warm.json == {"model": fake.lora_names[0], "prompt": "a", "max_tokens": 1}
        assert warm.headers["authorization"] == "Bearer k"
        assert fake.requests_to(CHAT) == []
        fake.answer_gate.open()
        assert (await task).status == 200
        await p.ask("sql")
        assert len(fake.requests_to("/v1/completions")) == 1


async def test_a_warm_up_that_fails_is_not_the_clients_problem(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, warm_up=True) as p:
        fake.inject(Reply(500, b"boom"), path="/v1/completions")
        assert (await p.ask("sql")).status == 200


# --- base models ---------------------------------------------------------------------------


@pytest.fixture
async def big() -> AsyncIterator[FakeVllm]:
    async with FakeVllm(base="big", base_root="org/Big-7B") as server:
        yield server


async def test_a_request_for_a_base_model_goes_where_that_is(
    fake: FakeVllm, big: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, big) as p:
        assert [by(await p.ask(model)) for model in ("tiny", "big")] == ["gpu-0", "gpu-1"]
        listing = (await p.get("/v1/models")).json["data"]
        assert [one["id"] for one in listing][:2] == ["tiny", "big"]
        await big.stop()
        answer = await p.ask("big")
        assert (answer.status, answer.code) == (502, "upstream_connect")
        assert (await p.ask("tiny")).status == 200
        await big.start()


@pytest.mark.parametrize("says", ["big", "org/Big-7B", "/somewhere/else/Big-7B/", "meta/Alias"])
async def test_an_adapter_goes_to_its_own_base_model(
    fake: FakeVllm, big: FakeVllm, proxied: Start, tmp_path: Path, says: str
) -> None:
    """As adapter_config.json calls it: by its name, its root, its folder, or an alias."""
    path = write(tmp_path / "sql", base_model_name_or_path=says)
    aliases = {"big": ("meta/Alias",)}
    async with proxied(fake, big, adapters={"sql": path}, base_aliases=aliases) as p:
        for _ in range(3):
            assert by(await p.ask("sql")) == "gpu-1"
        assert fake.loads == []


async def test_the_operators_word_counts_more_than_the_files(
    fake: FakeVllm, big: FakeVllm, proxied: Start, tmp_path: Path
) -> None:
    path = write(tmp_path / "sql", base_model_name_or_path="big")
    async with proxied(fake, big, adapters=[Adapter("sql", path, base="tiny")]) as p:
        assert by(await p.ask("sql")) == "gpu-0"


async def test_pins_go_to_their_own_base_model_only(
    fake: FakeVllm, big: FakeVllm, proxied: Start
) -> None:
    adapter = Adapter("sql", "/adapters/sql", base="big", pin=True)
    async with proxied(fake, big, adapters=[adapter], **PROBING):
        await until(lambda: big.loras and len(fake.requests_to("/health")) > 3)
        assert fake.loads == []


# --- drain ---------------------------------------------------------------------------------


async def test_a_drained_upstream_ends_its_requests_and_gets_no_more(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes) as p:
        name = by(await p.ask("sql"))
        fake = fakes[int(name[-1])]
        fake.stream_gate.shut()
        async with p.session.post(p.url + CHAT, json=chat("sql", stream=True)) as streaming:
            await fake.until(lambda: fake.stream_gate.waiting == 1)
            p.app.fleet.drain(name, draining=True)
            assert name not in {by(await p.ask("sql")) for _ in range(3)}
            fake.stream_gate.open()
            assert (await streaming.read()).endswith(b"data: [DONE]\n\n")
        p.app.fleet.drain(name, draining=False)
        assert name in {by(await p.ask("sql")) for _ in range(3)}


async def test_drain_is_a_setting_too(fakes: Sequence[FakeVllm], proxied: Start) -> None:
    fake, other, _ = fakes
    async with proxied(fake, adapters=[PIN], upstream={"drain": True}, **PROBING) as p:
        answer = await p.ask("tiny")
        assert (answer.status, answer.code) == (503, "no_upstream")
        assert (await p.get("/ready")).status == 503
        await p.app.fleet.apply(settings(fake))
        assert (await p.ask("tiny")).status == 200
        await until(lambda: fake.loras)  # its pins, too
        await p.app.fleet.apply([*settings(fake, drain=True), *settings(other, first=1)])
        assert by(await p.ask("tiny")) == "gpu-1"


async def test_an_operators_drain_outlives_other_settings(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes[:2]) as p:
        p.app.fleet.drain("gpu-0", draining=True)
        await p.app.fleet.apply(settings(*fakes[:2], weight=2.0))
        assert {by(await p.ask(model)) for model in ("tiny", "sql", "pirate")} == {"gpu-1"}


async def test_only_an_upstream_can_be_drained(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        with pytest.raises(KeyError):
            p.app.fleet.drain("gpu-7", draining=True)


# --- coming, going, changing ---------------------------------------------------------------


async def test_one_that_joins_is_used(fakes: Sequence[FakeVllm], proxied: Start) -> None:
    async with proxied(fakes[0], adapters=[PIN]) as p:
        await until(lambda: fakes[0].loras)
        await p.app.fleet.apply(settings(*fakes))
        await until(lambda: held(fakes) == [["sql"]] * 3)
        assert set(await p.samples("lora_proxy_upstream_up")) == {(f"gpu-{n}",) for n in range(3)}


async def test_one_that_leaves_ends_its_streams_and_is_forgotten(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes[:2]) as p:
        name = by(await p.ask("sql"))
        fake, other = fakes[int(name[-1])], fakes[1 - int(name[-1])]
        gone = p.app.fleet.members[name]
        fake.stream_gate.shut()
        async with p.session.post(p.url + CHAT, json=chat("sql", stream=True)) as streaming:
            await fake.until(lambda: fake.stream_gate.waiting == 1)
            await p.app.fleet.apply(settings(other, first=1 - int(name[-1])))
            assert (await p.ask("sql")).status == 200
            assert len(other.loads) == 1
            fake.stream_gate.open()
            assert (await streaming.read()).endswith(b"data: [DONE]\n\n")
        await until(lambda: gone not in p.app.fleet._leaving)
        assert not gone.pool.connections
        assert (await p.samples("lora_proxy_upstream_up"))[(name,)] == 0
        in_flight = await p.samples("lora_proxy_requests_in_flight")
        assert set(in_flight.values()) == {0}


async def test_a_load_under_way_where_one_leaves_ends_well(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(fakes[0]) as p:
        fakes[0].load_gate.shut()
        task = asyncio.create_task(p.ask("sql"))
        await fakes[0].until(lambda: fakes[0].load_gate.waiting == 1)
        await p.app.fleet.apply(settings(fakes[1], first=1))
        await asyncio.sleep(0.15)  # time in which it could be given up
        fakes[0].load_gate.open()
        assert (await task).status == 200


async def test_settings_change_in_place(fakes: Sequence[FakeVllm], proxied: Start) -> None:
    fake = fakes[0]
    async with proxied(fake, adapters={f"a{n}": f"/adapters/a{n}" for n in range(4)}) as p:
        (member,) = p.members
        for n in range(4):
            await p.ask(f"a{n}")
        assert len(fake.loras) == 4
        await p.app.fleet.apply(settings(fake, max_cpu_loras=2, weight=3.0))
        assert p.members == (member,)
        assert (member.weight > 0, member.settings.weight) == (True, 3.0)
        fake.restart()
        for n in range(4):
            await p.ask(f"a{n}")
        assert len(fake.loras) <= 2
        await p.app.fleet.apply(settings(fake))
        for n in range(4):
            await p.ask(f"a{n}")
        assert len(fake.loras) == 4


async def test_another_key_is_used_for_everything(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream={"api_key": "old"}) as p:
        await p.ask("sql")
        await p.app.fleet.apply(settings(fake, api_key=SecretStr("new")))
        before = len(fake.requests)
        await p.ask("pirate")
        assert {seen.headers["authorization"] for seen in fake.requests[before:]} == {"Bearer new"}


async def asked_all_the_time(
    p: Proxied, models: Sequence[str], until_done: Callable[[], bool], clients: int = 12
) -> list[Answer]:
    """The answers to clients that ask, one question after the other."""
    answers: list[Answer] = []

    async def client(number: int) -> None:
        while not until_done():
            model = models[number % len(models)]
            answers.append(await p.ask(model, stream=number % 3 == 0))

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return answers


async def test_changes_under_load_fail_no_request(proxied: Start) -> None:
    """Upstreams join, leave, move and change, one of them always another; nobody notices."""
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeVllm()) for _ in range(4)]
        async with proxied(fakes[0], retry=RetrySettings(budget=1.0)) as p:
            done = False

            async def change() -> None:
                nonlocal done
                for turn in range(12):
                    one, two = fakes[turn % 4], fakes[(turn + 1) % 4]
                    # gpu-0 is now elsewhere; gpu-1 comes and goes.
                    await p.app.fleet.apply(settings(one, two)[: 1 + turn % 2])
                    answered = len(one.requests_to(CHAT)) + 20
                    await one.until(lambda o=one, n=answered: len(o.requests_to(CHAT)) > n)  # type: ignore[misc]  # bound now
                    await p.app.fleet.apply(settings(one, weight=2.0, max_in_flight=3))
                done = True

            changing = asyncio.create_task(change())
            answers = await asked_all_the_time(p, ("sql", "pirate", "tiny"), lambda: done)
            await changing
            failed = [(answer.status, answer.body) for answer in answers if answer.status != 200]
            assert failed == []
            assert all(fake.requests_to(CHAT) for fake in fakes)
            await until(lambda: not p.app.fleet._leaving)


# --- discovery -----------------------------------------------------------------------------


async def test_a_file_of_upstreams_is_followed(
    fakes: Sequence[FakeVllm], proxied: Start, tmp_path: Path
) -> None:
    file = tmp_path / "upstreams.yaml"

    def listed(*servers: FakeVllm) -> None:
        entries = [{"name": one.name, "url": one.url} for one in settings(*servers, first=5)]
        fresh = tmp_path / "fresh"
        fresh.write_text(json.dumps(entries))
        fresh.replace(file)

    listed(fakes[1])
    async with proxied(upstreams_file=file, discovery_interval=0.01) as p:
        assert by(await p.ask("tiny")) == "gpu-5"
        listed(fakes[1], fakes[2])
        await until(lambda: set(p.app.fleet.members) == {"gpu-5", "gpu-6"})
        listed(fakes[2])
        await until(lambda: len(p.members) == 1)
        assert (await p.ask("tiny")).status == 200
        assert len(fakes[2].requests_to(CHAT)) == 1
        file.write_text("- {name: [")
        await asyncio.sleep(0.05)
        assert (await p.ask("tiny")).status == 200


# --- capacity ------------------------------------------------------------------------------


async def test_the_servers_own_word_is_the_capacity(fake: FakeVllm, proxied: Start) -> None:
    adapters = {f"a{n}": f"/adapters/a{n}" for n in range(4)}
    async with proxied(fake, adapters=adapters, **PROBING) as p:
        (member,) = p.members
        assert member.slots.capacity is None
        await p.ask("a0")
        await until(lambda: member.slots.capacity == 2)
        for n in range(4):
            assert (await p.ask(f"a{n}")).status == 200
        assert len(fake.loras) == 2


async def test_a_server_without_metrics_is_none_the_worse(fake: FakeVllm, proxied: Start) -> None:
    fake.inject(Reply(500, b"no"), path="/metrics")
    async with proxied(fake, **PROBING) as p:
        await until(lambda: len(fake.requests_to("/metrics")) > 3)
        assert p.members[0].usable
        fake.clear_faults()
