"""Adapters come when they are asked for: once, bounded, healed, and never at another's cost."""

import asyncio
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import REFUSALS, FakeVllm, OnDisk, Raw, Reply
from proxied import CHAT, Answer, Proxied, Start, chat, until

from lora_proxy import member, versions
from lora_proxy.types import Adapter

LOOPS = ("asyncio", "uvloop")  # conftest.py runs every async test of this module on both

LOAD = "/v1/load_lora_adapter"

Make = Callable[..., str]


def said(answer: Answer) -> str:
    return str(answer.json["choices"][0]["message"]["content"])


def message(answer: Answer) -> str:
    return str(answer.json["error"]["message"])


def assert_answers(answers: list[Answer], fake: FakeVllm, name: str) -> None:
    (served,) = [lora for lora in fake.loras if lora.startswith(f"{name}@")]
    for answer in answers:
        assert answer.status == 200, answer.body
        assert said(answer).startswith(f"I am {served}.")
        assert answer.json["model"] == name


async def asking(p: Proxied, count: int, model: str = "sql") -> list[asyncio.Task[Answer]]:
    """So many questions that all wait for their adapter by now."""
    before = p.members[0].slots.waiting
    tasks = [asyncio.create_task(p.ask(model, str(number))) for number in range(count)]
    await until(lambda: p.members[0].slots.waiting == before + count)
    return tasks


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes between tries, nor between looks at files."""
    monkeypatch.setattr(member, "BACKOFF_FIRST", 0.0)
    monkeypatch.setattr(member, "RETRY_UNSEEN", 0.0)
    monkeypatch.setattr(versions, "RECHECK", 0.0)


# --- one load for everybody ----------------------------------------------------------------


async def test_200_first_requests_are_one_load(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        fake.load_gate.shut()
        tasks = await asking(p, 200)
        await fake.until(lambda: fake.load_gate.waiting == 1)
        fake.load_gate.open()
        assert_answers(await asyncio.gather(*tasks), fake, "sql")
        assert len(fake.loads) == 1


async def test_50_of_200_leave_while_it_loads_and_the_others_are_answered(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        fake.load_gate.shut()
        tasks = await asking(p, 200)
        for task in tasks[::4]:
            task.cancel()
        await until(lambda: p.members[0].slots.waiting == 150)
        fake.load_gate.open()
        rest = [task for number, task in enumerate(tasks) if number % 4]
        assert_answers(await asyncio.gather(*rest), fake, "sql")
        assert len(fake.loads) == 1
        assert len(fake.requests_to(CHAT)) == 150


async def test_all_leave_and_the_load_still_completes(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        fake.load_gate.shut()
        for task in await asking(p, 20):
            task.cancel()
        slots = p.members[0].slots
        await until(lambda: slots.waiting == 0)
        fake.load_gate.open()
        await until(lambda: slots.residents)
        assert slots.busy == 0
        assert_answers([await p.ask("sql")], fake, "sql")
        assert len(fake.loads) == 1


async def test_two_adapters_load_side_by_side(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        fake.load_gate.shut()
        sql, pirate = await asking(p, 3), await asking(p, 3, "pirate")
        await fake.until(lambda: fake.load_gate.waiting == 2)
        fake.load_gate.open()
        assert_answers(await asyncio.gather(*sql), fake, "sql")
        assert_answers(await asyncio.gather(*pirate), fake, "pirate")
        assert len(fake.loads) == 2


async def test_a_load_that_takes_too_long_is_a_504_and_leaves_nothing(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, load_timeout=0.3) as p:
        fake.load_gate.shut()
        for answer in await asyncio.gather(*(p.ask("sql") for _ in range(5))):
            assert (answer.status, answer.code) == (504, "adapter_load_timeout")
            assert "load_timeout" in message(answer)
        assert (await p.ask("tiny")).status == 200
        await until(lambda: len(p.app.fleet._shared.tasks) == 1)  # the probe's
        fake.load_gate.open()
        await fake.until(lambda: bool(fake.loras))


async def test_what_a_slow_load_brings_in_the_end_is_found(
    fake: FakeVllm, proxied: Start, quick: None
) -> None:
    async with proxied(fake, load_timeout=1.0) as p:
        fake.load_gate.shut()
        assert (await p.ask("sql")).status == 504
        fake.load_gate.open()
        await fake.until(lambda: bool(fake.loras))
        await until(lambda: p.members[0].slots.waiting == 0)
        assert_answers([await p.ask("sql")], fake, "sql")
        assert len(fake.loads) == 1


# --- what is there already -----------------------------------------------------------------


async def test_an_adapter_given_by_the_operator_is_adopted_by_its_root(proxied: Start) -> None:
    async with FakeVllm(lora_modules={"own": "/adapters/sql/"}) as fake, proxied(fake) as p:
        for stream in (False, True):
            answer = await p.ask("sql", stream=stream)
            assert b'"model":"sql"' in answer.body
            assert b'"model":"own"' not in answer.body
            assert fake.requests_to(CHAT)[-1].json["model"] == "own"
        assert fake.loads == []


async def test_an_adopted_adapter_of_the_same_name_needs_no_rewriting(proxied: Start) -> None:
    async with FakeVllm(lora_modules={"sql": "/adapters/sql"}) as fake, proxied(fake) as p:
        assert (await p.ask("sql")).json["model"] == "sql"
        assert fake.loads == []


async def test_the_operators_name_for_another_root_is_not_adopted(proxied: Start) -> None:
    async with FakeVllm(lora_modules={"sql": "/other"}) as fake, proxied(fake) as p:
        await p.ask("sql")
        assert fake.requests_to(CHAT)[0].json["model"] == fake.loads[0][0]
        assert len(fake.loads) == 1


async def test_what_an_earlier_proxy_loaded_is_used(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
    async with proxied(fake) as p:
        assert len(p.members[0].slots.residents) == 1
        await p.ask("sql")
    assert len(fake.loads) == 1


async def test_two_proxies_load_the_same_adapter_at_once(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as one, proxied(fake) as two:
        fake.load_gate.shut()
        tasks = [asyncio.create_task(p.ask("sql")) for p in (one, two) for _ in range(3)]
        await fake.until(lambda: len(fake.loads) == 2)
        fake.load_gate.open()
        assert_answers(await asyncio.gather(*tasks), fake, "sql")
        assert len({name for name, _ in fake.loads}) == 1


async def test_a_rival_with_the_same_root_is_welcome(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        name = await served_name(p, "sql")
        fake.add_rival(name, "/adapters/sql")
        assert_answers([await p.ask("sql")], fake, "sql")
        assert len(fake.loads) == 1


async def test_a_rival_with_another_root_is_a_conflict(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        name = await served_name(p, "sql")
        fake.add_rival(name, "/adapters/evil")
        for _ in range(2):
            answer = await p.ask("sql")
            assert (answer.status, answer.code) == (422, "adapter_conflict")
        assert not fake.requests_to(CHAT)


async def served_name(p: Proxied, adapter: str) -> str:
    """What the proxy would call an adapter now."""
    await p.app.fleet.route(p.app.fleet.catalog.resolve(adapter))
    version = p.app.fleet.versions.present(adapter)
    assert version is not None
    return version.module.served


# --- what cannot be loaded -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "status", "code", "says"),
    [
        (OnDisk(rank=128), 422, "adapter_rank_too_high", "--max-lora-rank 128"),
        (None, 404, "adapter_not_found", "/adapters/sql"),
        (OnDisk(refusal=REFUSALS["dora"]), 422, "adapter_invalid", "DoRA"),
        (OnDisk(refusal=REFUSALS["modules_to_save"]), 422, "adapter_invalid", "lm_head"),
        (OnDisk(refusal=REFUSALS["no_weights"]), 422, "adapter_invalid", "tensors"),
        (OnDisk(refusal=REFUSALS["corrupt"]), 422, "adapter_invalid", "header"),
    ],
)
async def test_a_bad_adapter_is_refused_with_its_reason_and_asked_for_once(
    fake: FakeVllm, proxied: Start, found: OnDisk | None, status: int, code: str, says: str
) -> None:
    fake.disk["/adapters/sql"] = found
    async with proxied(fake) as p:
        for _ in range(3):
            answer = await p.ask("sql")
            assert (answer.status, answer.code) == (status, code)
            assert says in message(answer)
            assert "@" not in message(answer)  # served names are nobody's business
        assert len(fake.loads) == 1
        assert not fake.requests_to(CHAT)
        assert (await p.ask("pirate")).status == 200


async def test_a_bad_adapter_that_cannot_be_watched_is_tried_again_after_a_while(
    fake: FakeVllm, proxied: Start, quick: None
) -> None:
    fake.disk["/adapters/sql"] = None
    async with proxied(fake) as p:
        assert (await p.ask("sql")).code == "adapter_not_found"
        fake.disk["/adapters/sql"] = OnDisk()
        assert_answers([await p.ask("sql")], fake, "sql")


async def test_runtime_updating_disabled_names_the_variable(proxied: Start) -> None:
    async with FakeVllm(runtime_updating=False) as fake, proxied(fake) as p:
        answer = await p.ask("sql")
        assert (answer.status, answer.code) == (503, "runtime_updating_disabled")
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in message(answer)
        assert (await p.ask("tiny")).status == 200


async def test_lora_disabled_names_the_flag(proxied: Start) -> None:
    async with FakeVllm(enable_lora=False) as fake, proxied(fake) as p:
        answer = await p.ask("sql")
        assert (answer.status, answer.code) == (503, "runtime_updating_disabled")
        assert "--enable-lora" in message(answer)


async def test_an_adapter_named_like_a_base_model_that_comes_later_is_a_conflict(
    proxied: Start,
) -> None:
    async with FakeVllm(base="sql") as fake:
        await fake.stop()
        async with proxied(fake, probe_interval=0.02) as p:
            await fake.start()
            await until(lambda: p.app.fleet.ready)
            answer = await p.ask("sql")
            assert (answer.status, answer.code) == (422, "name_conflict")
            assert "base model" in message(answer)
            assert (await p.ask("pirate")).status == 200
            (fault,) = p.faults  # said once, not with every probe
            assert "base model 'sql'" in fault
            p.faults.clear()


async def test_a_failure_that_may_pass_is_not_repeated_at_once(
    fake: FakeVllm, proxied: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "BACKOFF_FIRST", 3600.0)
    monkeypatch.setattr(member, "BACKOFF_MOST", 3600.0)
    fake.inject(Reply(503, b"busy"), path=LOAD)
    async with proxied(fake) as p:
        for _ in range(3):
            answer = await p.ask("sql")
            assert (answer.status, answer.code) == (503, "adapter_load_failed")
        assert len(fake.requests_to(LOAD)) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Reply(503, b"busy"),
        Reply(500, b"Internal Server Error"),
        Reply(500, {"error": {"message": "EngineCore encountered an issue."}}),
        Reply(401, {"error": "Unauthorized"}),
        Raw(),
        Raw(b"rubbish\r\n\r\n"),
        Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nSucc"),
    ],
)
async def test_a_failure_that_may_pass_is_tried_again_after_the_backoff(
    fake: FakeVllm, proxied: Start, quick: None, fault: Any
) -> None:
    fake.inject(fault, path=LOAD, times=1)
    async with proxied(fake) as p:
        answer = await p.ask("sql")
        assert (answer.status, answer.code) == (503, "adapter_load_failed")
        assert_answers([await p.ask("sql")], fake, "sql")


async def test_a_load_that_fails_here_is_tried_on_the_next_upstream(proxied: Start) -> None:
    """Whatever breaks before a generation has begun is no reason to fail."""
    for path, fault in ((LOAD, Reply(503, b"busy")), ("/v1/models", Raw())):
        async with FakeVllm() as one, FakeVllm() as two, proxied(one, two) as p:
            one.inject(fault, path=path)
            two.inject(fault, path=path)
            preferred = await first_choice(p, "sql", (one, two))
            other = two if preferred is one else one
            other.clear_faults()
            assert_answers([await p.ask("sql")], other, "sql")
            assert not preferred.requests_to(CHAT)


async def first_choice(p: Proxied, model: str, fakes: tuple[FakeVllm, ...]) -> FakeVllm:
    choices = await p.app.fleet.route(p.app.fleet.catalog.resolve(model))
    return fakes[int(choices[0].member.name.removeprefix("gpu-"))]


# --- folders that the proxy can read -------------------------------------------------------

STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes an adapter's folder, again and again if need be."""

    def make(b: bytes = b"\x00\x00\x80\x3f", *, weights: bool = True, **config: object) -> str:
        header: dict[str, object] = {}
        for number, factor in enumerate("AB"):
            offsets = [4 * number, 4 * number + 4]
            header[f"{STEM}.lora_{factor}.weight"] = {
                "dtype": "F32",
                "shape": [1],
                "data_offsets": offsets,
            }
        raw = json.dumps(header).encode()
        given = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(given | config))
        if weights:
            data = struct.pack("<Q", len(raw)) + raw + b"\x00\x00\x80\x3f" + b
            (tmp_path / "adapter_model.safetensors").write_bytes(data)
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ({"r": 128}, "adapter_rank_too_high", "--max-lora-rank 128"),
        ({"use_dora": True}, "adapter_invalid", "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "adapter_invalid", "modules_to_save"),
        ({"weights": False}, "adapter_invalid", "adapter_model.safetensors"),
        ({"b": bytes(4)}, "adapter_untrained", "lora_B"),
    ],
)
async def test_a_bad_folder_is_refused_without_a_call(
    fake: FakeVllm, proxied: Start, make: Make, what: dict[str, Any], code: str, says: str
) -> None:
    async with proxied(fake, adapters={"sql": make(**what)}, upstream={"max_lora_rank": 64}) as p:
        for _ in range(2):
            answer = await p.ask("sql")
            assert (answer.status, answer.code) == (422, code)
            assert says in message(answer)
        assert fake.loads == []


async def test_a_corrected_folder_is_loaded_at_once(
    fake: FakeVllm, proxied: Start, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "RECHECK", 0.0)
    async with proxied(fake, adapters={"sql": make(bytes(4))}) as p:
        assert (await p.ask("sql")).code == "adapter_untrained"
        make(b"\x00\x00\x00\x40")
        assert_answers([await p.ask("sql")], fake, "sql")


async def test_a_folder_whose_weights_come_later_is_loaded_then(
    fake: FakeVllm, proxied: Start, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "RECHECK", 0.0)
    async with proxied(fake, adapters={"sql": make(weights=False)}) as p:
        assert (await p.ask("sql")).code == "adapter_invalid"
        make()
        assert_answers([await p.ask("sql")], fake, "sql")


async def test_changed_content_gets_another_served_name(
    fake: FakeVllm, proxied: Start, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "RECHECK", 0.0)
    async with proxied(fake, adapters={"sql": make()}) as p:
        await p.ask("sql")
        fake.restart()
        make(b"\x00\x00\x00\x40")
        assert_answers([await p.ask("sql")], fake, "sql")
        (before, _), (after, _) = fake.loads
        assert before != after
        assert fake.lora_names == [after]


async def test_content_that_changes_while_it_loads_is_unloaded_and_nobody_is_answered_by_it(
    fake: FakeVllm, proxied: Start, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "RECHECK", 0.0)
    async with proxied(fake, adapters={"sql": make()}) as p:
        fake.load_gate.shut()
        (old,) = await asking(p, 1)
        await fake.until(lambda: len(fake.loads) == 1)  # the files have been judged
        make(b"\x00\x00\x00\x40")
        (new,) = await asking(p, 1)
        await fake.until(lambda: len(fake.loads) == 2)
        (before, _), (after, _) = fake.loads
        assert before != after
        fake.load_gate.open()
        # Which of the two contents the server read under the old name, nobody knows.
        assert said(await old).startswith(f"I am {after}.")
        assert said(await new).startswith(f"I am {after}.")
        await fake.until(lambda: fake.unloads == [before])
        assert fake.lora_names == [after]


async def test_a_folder_that_does_not_change_is_not_loaded_again(
    fake: FakeVllm, proxied: Start, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "RECHECK", 0.0)
    async with proxied(fake, adapters={"sql": make()}) as p:
        await asyncio.gather(*(p.ask("sql") for _ in range(20)))
        assert len(fake.loads) == 1


async def test_the_declared_revision_is_part_of_the_served_name_where_files_are_not_seen(
    fake: FakeVllm, proxied: Start
) -> None:
    for revision in ("v1", "v2"):
        adapter = Adapter("sql", "/adapters/sql", revision=revision)
        async with proxied(fake, adapters=[adapter]) as p:
            assert (await p.ask("sql")).status == 200
    assert len({name for name, _ in fake.loads}) == 2


# --- capacity ------------------------------------------------------------------------------


async def test_with_one_slot_two_adapters_take_turns(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream={"max_cpu_loras": 1}) as p:
        for _ in range(3):
            for model in ("sql", "pirate"):
                assert_answers([await p.ask(model)], fake, model)
                assert len(fake.loras) == 1
        assert len(fake.loads) == 6
        assert len(fake.unloads) == 5


async def test_an_adapter_in_use_is_not_unloaded_for_another(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, upstream={"max_cpu_loras": 1}) as p:
        fake.stream_gate.shut()
        async with p.session.post(p.url + CHAT, json=chat("sql", stream=True)) as streaming:
            (waiting,) = await asking(p, 1, "pirate")
            for _ in range(3):
                fake.stream_gate.let()
                assert b"data: " in await streaming.content.readany()
            assert fake.unloads == []
            assert (await p.ask("tiny")).status == 200  # a base model needs no slot
            fake.stream_gate.open()
            assert (await streaming.read()).endswith(b"[DONE]\n\n")
            assert_answers([await waiting], fake, "pirate")
        assert [name.partition("@")[0] for name in fake.unloads] == ["sql"]


async def test_waiting_for_a_slot_ends_with_load_timeout(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream={"max_cpu_loras": 1}, load_timeout=1.0) as p:
        fake.answer_gate.shut()
        using = asyncio.create_task(p.ask("sql"))
        await fake.until(lambda: fake.running == 1)
        answer = await p.ask("pirate")
        assert (answer.status, answer.code) == (504, "adapter_load_timeout")
        assert len(fake.loads) == 1
        fake.answer_gate.open()
        assert_answers([await using], fake, "sql")


async def test_many_adapters_over_few_slots_all_get_their_answers(
    fake: FakeVllm, proxied: Start
) -> None:
    adapters = {f"a{number}": f"/adapters/a{number}" for number in range(6)}
    async with proxied(fake, adapters=adapters, upstream={"max_cpu_loras": 2}) as p:

        async def client(name: str) -> None:
            for _ in range(4):
                answer = await p.ask(name)
                assert said(answer).startswith(f"I am {name}@")
                assert len(fake.loras) <= 2

        await asyncio.gather(*(client(name) for name in adapters for _ in range(2)))


async def test_an_unload_that_fails_is_not_the_clients_problem(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, upstream={"max_cpu_loras": 1}) as p:
        fake.inject(Reply(500, b"no"), path="/v1/unload_lora_adapter", times=1)
        assert (await p.ask("sql")).status == 200
        assert (await p.ask("pirate")).status == 200
        unloads = await p.samples("lora_proxy_adapter_unloads_total")
        assert unloads == {("sql", "failed", "gpu-0"): 1}


async def test_stopping_in_the_middle_of_loads_leaves_nothing(
    fake: FakeVllm, proxied: Start
) -> None:
    """One adapter is loading and the other queues for its slot."""
    async with proxied(fake, upstream={"max_cpu_loras": 1}, timeouts={"drain": 0.05}) as p:
        fake.load_gate.shut()
        tasks = [*await asking(p, 2), *await asking(p, 2, "pirate")]
        await p.app.stop()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, Exception)
        fake.load_gate.open()


# --- self-healing --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("drop", [False, True])
async def test_a_restart_of_the_upstream_is_healed(
    fake: FakeVllm, proxied: Start, *, stream: bool, drop: bool
) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        for _ in range(3):
            before = len(fake.loads)
            fake.restart(drop_connections=drop)
            answer = await p.ask("sql", stream=stream)
            assert answer.status == 200
            assert b'"model":"sql"' in answer.body
            assert len(fake.loads) == before + 1
        retries = await p.samples("lora_proxy_retries_total")
        assert retries == {("adapter_lost", "gpu-0"): 3}


@pytest.mark.parametrize("stream", [False, True])
async def test_20_concurrent_requests_heal_with_one_load(
    fake: FakeVllm, proxied: Start, *, stream: bool
) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        fake.restart()
        answers = await asyncio.gather(*(p.ask("sql", stream=stream) for _ in range(20)))
        assert {answer.status for answer in answers} == {200}
        assert len(fake.loads) == 2


async def test_the_process_dies_and_comes_back(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        await fake.stop()
        assert (await p.ask("sql")).status == 502
        fake.restart()
        await fake.start()
        assert_answers([await p.ask("sql")], fake, "sql")
        assert len(fake.loads) == 2


async def test_a_404_for_another_reason_is_passed_on_and_not_repeated(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        fake.inject(Reply(404, {"detail": "Not Found"}), path=CHAT)
        answer = await p.ask("sql")
        assert (answer.status, answer.json) == (404, {"detail": "Not Found"})
        assert len(fake.requests_to(CHAT)) == 2
        assert len(fake.loads) == 1


async def test_an_upstream_that_denies_the_adapter_for_good_is_believed_in_the_end(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        name = fake.lora_names[0]
        text = f"The model `{name}` does not exist."
        fake.inject(Reply(404, {"error": {"message": text}}), path=CHAT)
        answer = await p.ask("sql")
        assert answer.status == 404
        assert message(answer) == "The model `sql` does not exist."
        assert len(fake.requests_to(CHAT)) == 3  # once, and once more


async def test_a_404_of_the_base_model_is_passed_on(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        text = "The model `tiny` does not exist."
        fake.inject(Reply(404, {"error": {"message": text}}), path=CHAT)
        answer = await p.ask("tiny")
        assert (answer.status, message(answer)) == (404, text)
        assert len(fake.requests_to(CHAT)) == 1


async def test_a_probe_notices_a_restart(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, probe_interval=0.02) as p:
        await p.ask("sql")
        fake.restart()
        await until(lambda: not p.members[0].slots.residents)
        assert_answers([await p.ask("sql")], fake, "sql")
        assert not await p.samples("lora_proxy_retries_total")
