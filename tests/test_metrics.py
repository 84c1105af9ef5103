"""What `/metrics` says after traffic, and that clients cannot make it grow."""

import asyncio
import re

import pytest
from fake_vllm import Cut, FakeVllm
from prometheus_client.parser import text_string_to_metric_families
from proxied import CHAT, Start, chat, until
from pydantic import SecretStr

from lora_proxy import metrics
from lora_proxy.types import Adapter, Route


async def test_every_metric_is_declared_with_its_labels(fake: FakeVllm, proxied: Start) -> None:
    copied = Route("copied", (("tiny", 1.0),), mirror="sql", sample=1.0)
    limits = {"max_cpu_loras": 1, "max_in_flight": 1}
    async with proxied(fake, upstream=limits, routes=(copied,)) as p:
        await asyncio.gather(*(p.ask("copied") for _ in range(3)))
        await p.ask("sql", stream=True)
        await p.ask("pirate")
        fake.restart()
        await p.ask("pirate")
        answer = await p.get("/metrics")
        assert answer.headers["content-type"] == metrics.CONTENT_TYPE
        seen = {
            re.sub(r"_(bucket|sum|count)$", "", sample.name): set(sample.labels) - {"le"}
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
            if sample.name.startswith("lora_proxy_") and not sample.name.endswith("_created")
        }
        expected = {name: set(labels) for name, labels in metrics.LABELS.items()}
        del expected["lora_proxy_auth_failures_total"]  # no key was asked for
        assert seen == expected
        assert b"process_resident_memory_bytes" in answer.body


async def test_requests_are_counted_by_what_served_them(fake: FakeVllm, proxied: Start) -> None:
    adapter = Adapter("sql", "/adapters/sql", aliases=("alias",))
    async with proxied(fake, adapters=[adapter]) as p:
        await p.ask("sql")
        await p.ask("alias", stream=True)
        await p.ask("tiny")
        await p.ask(None)
        await p.ask("made-up-name")
        await p.ask(7)
        await p.post("/v1/completions", {"model": "sql"})  # no prompt: the upstream's 400
        await p.get("/v1/models")
        await p.get("/v1/models/made-up-name")
        await p.get("/made-up-path")
        await p.post("/v1/load_lora_adapter", {})
        await p.request("DELETE", CHAT)
        await p.get("/v1/made-up-path")
        found = await p.samples("lora_proxy_requests_total")
        # adapter, code, endpoint, upstream
        assert found == {
            ("sql", "200", CHAT, "gpu-0"): 2,
            ("tiny", "200", CHAT, "gpu-0"): 2,
            ("-", "404", CHAT, "-"): 1,
            ("-", "400", CHAT, "-"): 1,
            ("sql", "400", "/v1/completions", "gpu-0"): 1,
            ("-", "200", "/v1/models", "-"): 1,
            ("-", "404", "/v1/models/{name}", "-"): 1,
            ("-", "404", "other", "-"): 1,
            ("-", "403", "other", "-"): 1,
            ("-", "405", "other", "-"): 1,
            ("-", "404", "other", "gpu-0"): 1,
        }
        assert (await p.samples("lora_proxy_request_duration_seconds_count"))["sql",] == 3
        assert await p.samples("lora_proxy_time_to_first_token_seconds_count") == {("sql",): 1}
        assert b"made-up" not in (await p.get("/metrics")).body


async def test_an_unknown_name_that_the_default_answers_is_no_label(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, default_model="sql") as p:
        await p.ask("made-up-name")
        assert await p.samples("lora_proxy_requests_total") == {("sql", "200", CHAT, "gpu-0"): 1}
        assert b"made-up" not in (await p.get("/metrics")).body


async def test_loads_and_unloads_are_counted_by_result(fake: FakeVllm, proxied: Start) -> None:
    fake.loras["mine"] = "/adapters/adopted"
    adapters = {name: f"/adapters/{name}" for name in ("one", "two", "adopted", "bad")}
    fake.disk["/adapters/bad"] = None
    async with proxied(fake, adapters=adapters, upstream={"max_cpu_loras": 1}) as p:
        for name in ("one", "two", "adopted", "bad"):
            await p.ask(name)
        # adapter, result, upstream
        assert await p.samples("lora_proxy_adapter_loads_total") == {
            ("one", "ok", "gpu-0"): 1,
            ("two", "ok", "gpu-0"): 1,
            ("adopted", "adopted", "gpu-0"): 1,
            ("bad", "adapter_not_found", "gpu-0"): 1,
        }
        unloads = await p.samples("lora_proxy_adapter_unloads_total")
        # adapter, reason, upstream
        assert unloads["one", "evicted", "gpu-0"] == 1
        assert unloads["two", "evicted", "gpu-0"] == 1
        resident = await p.samples("lora_proxy_adapter_resident")
        assert resident.get(("two", "gpu-0"), 0) == 0
        loads = await p.samples("lora_proxy_adapter_load_duration_seconds_count")
        assert loads["one",] == 1


async def test_gauges_follow_the_state(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, probe_interval=0.02) as p:
        assert await p.samples("lora_proxy_upstream_up") == {("gpu-0",): 1}
        fake.answer_gate.shut()
        asking = [asyncio.ensure_future(p.ask(model)) for model in ("sql", "sql", "tiny")]
        await fake.until(lambda: fake.running == 3)
        in_flight = await p.samples("lora_proxy_requests_in_flight")
        assert in_flight == {("sql", "gpu-0"): 2, ("tiny", "gpu-0"): 1}
        assert await p.samples("lora_proxy_adapter_resident") == {("sql", "gpu-0"): 1}
        fake.answer_gate.open()
        await asyncio.gather(*asking)
        in_flight = await p.samples("lora_proxy_requests_in_flight")
        assert set(in_flight.values()) == {0}
        fake.loras.clear()
        await until(lambda: not p.members[0].slots.residents)
        assert await p.samples("lora_proxy_adapter_resident") == {("sql", "gpu-0"): 0}
        await fake.stop()
        await until(lambda: not p.app.fleet.ready)
        assert await p.samples("lora_proxy_upstream_up") == {("gpu-0",): 0}
        await fake.start()


@pytest.mark.parametrize("when", ["waiting", "streaming"])
async def test_a_client_that_left_is_counted_as_499_or_by_its_answer(
    fake: FakeVllm, proxied: Start, when: str
) -> None:
    async with proxied(fake) as p:
        gate = fake.answer_gate if when == "waiting" else fake.stream_gate
        gate.shut()
        asking = asyncio.ensure_future(p.session.post(p.url + CHAT, json=chat("sql", stream=True)))
        await fake.until(lambda: gate.waiting == 1)
        if when == "streaming":
            (await asking).close()
        asking.cancel()
        await fake.until(lambda: fake.aborted == 1)
        gate.open()
        await p.idle()
        assert await p.samples("lora_proxy_requests_total") == {("sql", "499", CHAT, "gpu-0"): 1}


async def test_an_answer_that_breaks_off_is_counted_as_the_failure_that_it_is(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.inject(Cut(2), path=CHAT)
        assert (await p.ask("sql", stream=True)).status == 200
        assert await p.samples("lora_proxy_requests_total") == {("sql", "502", CHAT, "gpu-0"): 1}


async def test_auth_failures_are_counted_by_reason(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, api_keys=(SecretStr("right"),)) as p:
        assert (await p.ask("tiny")).status == 401
        for key in ("wrong", "wrong as well"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await p.post(CHAT, chat("tiny"), headers=headers)).status == 401
        headers = {"authorization": "Bearer right"}
        assert (await p.post(CHAT, chat("tiny"), headers=headers)).status == 200
        assert await p.samples("lora_proxy_auth_failures_total") == {
            ("missing",): 1,
            ("unknown",): 2,
        }
        assert not [seen for seen in fake.requests if "right" in str(seen.headers)]
