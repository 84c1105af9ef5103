"""Requests that wait for a place: fairly, not for ever, and leaving nothing behind."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fake_vllm import CLOSE, FakeVllm, Reply
from proxied import CHAT, Answer, Proxied, Start, chat, until

from lora_proxy.settings import QueueSettings, UpstreamSettings

ONE = {"max_in_flight": 1}


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    async with FakeVllm() as server:
        yield server


def depth(p: Proxied) -> int:
    return p.app.fleet._gate.depth


async def waiting(p: Proxied, model: str, count: int = 1) -> list[asyncio.Task[Answer]]:
    """So many questions that wait for a place by now, in order."""
    tasks = []
    for number in range(count):
        before = depth(p)
        tasks.append(asyncio.create_task(p.ask(model, str(number))))
        await until(lambda d=before: depth(p) == d + 1)  # type: ignore[misc]  # bound now
    return tasks


async def in_its_place(p: Proxied, fake: FakeVllm, model: str = "tiny") -> asyncio.Task[Answer]:
    """A question that is being answered, and will be until the gate opens."""
    fake.answer_gate.shut()
    task = asyncio.create_task(p.ask(model))
    await fake.until(lambda: fake.running > 0)
    return task


def order(fake: FakeVllm) -> list[str]:
    """The adapters in the order in which their questions came to the server."""
    return [str(seen.json["model"]).partition("@")[0] for seen in fake.requests_to(CHAT)]


async def test_no_more_than_so_many_are_sent_at_once(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream={"max_in_flight": 3}) as p:
        fake.answer_gate.shut()
        tasks = [asyncio.create_task(p.ask("tiny")) for _ in range(20)]
        await until(lambda: depth(p) == 17 and fake.running == 3)
        most = 0
        for done in range(1, 21):
            fake.answer_gate.let()
            await until(lambda n=done: sum(task.done() for task in tasks) == n)  # type: ignore[misc]  # bound now
            most = max(most, fake.running)
        assert {task.result().status for task in tasks} == {200}
        assert most == 3
        fake.answer_gate.open()


async def test_who_has_room_is_asked_before_anybody_waits(
    fake: FakeVllm, other: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, other, upstream=ONE) as p:
        for one in (fake, other):
            one.answer_gate.shut()
        tasks = [asyncio.create_task(p.ask("sql")) for _ in range(3)]
        await until(lambda: depth(p) == 1)
        await until(lambda: (fake.running, other.running) == (1, 1))
        for one in (fake, other):
            one.answer_gate.open()
        assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}


async def test_a_busy_adapter_does_not_starve_another(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream=ONE) as p:
        first = await in_its_place(p, fake)
        tasks = await waiting(p, "sql", 4) + await waiting(p, "pirate", 2)
        fake.answer_gate.open()
        await asyncio.gather(first, *tasks)
        assert order(fake) == ["tiny", "sql", "pirate", "sql", "pirate", "sql", "sql"]


async def test_a_full_queue_refuses_at_once(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream=ONE, queue=QueueSettings(length=1)) as p:
        first = await in_its_place(p, fake)
        tasks = await waiting(p, "tiny")
        for path in (CHAT, "/v1/messages"):
            answer = await p.post(path, chat("tiny", max_tokens=3))
            assert (answer.status, answer.code) == (503, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        fake.answer_gate.open()
        for answer in await asyncio.gather(first, *tasks):
            assert answer.status == 200


async def test_waiting_has_an_end(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream=ONE, queue=QueueSettings(timeout=0.05)) as p:
        first = await in_its_place(p, fake)
        answer = await p.ask("tiny")
        assert (answer.status, answer.code) == (503, "queue_timeout")
        assert int(answer.headers["retry-after"]) >= 1
        assert depth(p) == 0
        fake.answer_gate.open()
        assert (await first).status == 200
        assert (await p.ask("tiny")).status == 200


async def test_a_client_that_leaves_gives_its_turn_to_the_next(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, upstream=ONE) as p:
        first = await in_its_place(p, fake)
        left, stayed = await waiting(p, "tiny", 2)
        left.cancel()
        await until(lambda: depth(p) == 1)
        fake.answer_gate.open()
        assert {(await first).status, (await stayed).status} == {200}
        assert len(fake.requests_to(CHAT)) == 2


async def test_clients_that_leave_while_they_are_let_in(fake: FakeVllm, proxied: Start) -> None:
    """Whatever the moment, the place is not lost."""
    async with proxied(fake, upstream=ONE) as p:
        for turns in range(12):
            first = await in_its_place(p, fake)
            (left,) = await waiting(p, "tiny")
            fake.answer_gate.open()
            for _ in range(turns):
                await asyncio.sleep(0)
            left.cancel()
            await asyncio.gather(first, left, return_exceptions=True)
            assert (await p.ask("tiny")).status == 200
        assert depth(p) == 0


@pytest.mark.parametrize("fault", [Reply(500, b"boom"), CLOSE])
async def test_a_failed_request_gives_its_place_back(
    fake: FakeVllm, proxied: Start, fault: Reply
) -> None:
    async with proxied(fake, upstream=ONE) as p:
        fake.inject(fault, path=CHAT, times=2)
        for _ in range(2):
            assert (await p.ask("sql")).status in {500, 502}
        assert (await p.ask("sql")).status == 200


async def test_a_stream_has_its_place_to_its_end(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream=ONE) as p:
        fake.stream_gate.shut()
        async with p.session.post(p.url + CHAT, json=chat("sql", stream=True)) as streaming:
            (task,) = await waiting(p, "sql")
            fake.stream_gate.let()
            await streaming.content.readany()
            assert len(fake.requests_to(CHAT)) == 1
        # The client has left in the middle of it.
        fake.stream_gate.open()
        assert (await task).status == 200


async def test_depth_and_wait_are_told(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream=ONE) as p:
        first = await in_its_place(p, fake)
        tasks = await waiting(p, "sql", 2)
        assert await p.samples("lora_proxy_queue_depth") == {(): 2}
        fake.answer_gate.open()
        await asyncio.gather(first, *tasks)
        assert await p.samples("lora_proxy_queue_depth") == {(): 0}
        # Who did not have to wait is not among them.
        assert await p.samples("lora_proxy_queue_wait_seconds_count") == {("sql",): 2}


async def test_another_limit_lets_more_in(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, upstream=ONE) as p:
        first = await in_its_place(p, fake)
        tasks = await waiting(p, "tiny", 3)
        await p.app.fleet.apply([UpstreamSettings("gpu-0", fake.url, max_in_flight=3)])
        await fake.until(lambda: fake.running == 3)
        assert depth(p) == 1
        await p.app.fleet.apply([UpstreamSettings("gpu-0", fake.url)])
        await fake.until(lambda: fake.running == 4)
        fake.answer_gate.open()
        assert {answer.status for answer in await asyncio.gather(first, *tasks)} == {200}


async def test_who_waits_for_an_upstream_that_leaves_goes_to_the_one_that_comes(
    fake: FakeVllm, other: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, upstream=ONE) as p:
        first = await in_its_place(p, fake)
        tasks = await waiting(p, "sql", 3)
        await p.app.fleet.apply([UpstreamSettings("gpu-9", other.url)])
        assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}
        assert len(other.requests_to(CHAT)) == 3
        fake.answer_gate.open()
        assert (await first).status == 200


async def test_who_waits_for_the_only_upstream_and_it_leaves_is_told(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, upstream=ONE) as p:
        first = await in_its_place(p, fake)
        (task,) = await waiting(p, "sql")
        await p.app.fleet.apply([])
        answer = await task
        assert (answer.status, answer.code) == (503, "no_upstream")
        fake.answer_gate.open()
        assert (await first).status == 200
