"""New weights take over from old ones: no request fails, and no answer mixes the two."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from adapter_folder import write
from aiohttp import web
from fake_vllm import FakeVllm, OnDisk, Reply
from proxied import CHAT, Answer, Proxied, Start, chat, until

from lora_proxy import sources, versions
from lora_proxy.types import Adapter, served_name

WATCHING = {"watch_interval": 0.01}
LOAD = "/v1/load_lora_adapter"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "sql")
    return tmp_path / "sql"


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    async with FakeVllm() as server:
        yield server


def named(folder: Path) -> str:
    """The served name of what is in the folder now."""
    return served_name(folder.name, sources.revision(str(folder), None))


def speaker(answer: Answer) -> str:
    """Who answered: fakes say their model's name."""
    return str(answer.json["choices"][0]["message"]["content"]).split()[2].rstrip(".")


def present(p: Proxied, adapter: str = "sql") -> str:
    """The served name that a public name stands for now."""
    version = p.app.fleet.versions.present(adapter)
    return "" if version is None else version.module.served


def changed(folder: Path, weight: float) -> str:
    """The new served name."""
    write(folder, weight)
    return named(folder)


async def test_new_files_are_loaded_beside_the_old_take_over_and_the_old_are_unloaded(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, adapters={"sql": str(folder)}, **WATCHING) as p:
        old = named(folder)
        assert speaker(await p.ask("sql")) == old
        fake.load_gate.shut()
        new = changed(folder, 2.0)
        await fake.until(lambda: fake.load_gate.waiting == 1)
        assert speaker(await p.ask("sql")) == old  # nobody waits for the new one
        fake.load_gate.open()
        await until(lambda: present(p) == new)
        answer = await p.ask("sql")
        assert (speaker(answer), answer.json["model"]) == (new, "sql")
        await fake.until(lambda: fake.lora_names == [new])
        assert fake.loads == [(old, str(folder)), (new, str(folder))]
        assert fake.unloads == [old]


async def test_it_is_swapped_on_every_holder_and_on_nobody_else(
    fake: FakeVllm, other: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with (
        FakeVllm() as third,
        proxied(fake, other, third, adapters={"sql": str(folder)}) as p,
    ):
        (adapter,) = p.app.fleet.catalog.adapters
        await p.ask("sql")
        module = p.app.fleet.versions.present("sql").module  # type: ignore[union-attr]  # asked
        lacking = next(m for m in p.members if not m.slots.residents)
        await lacking.ensure(module)
        new = changed(folder, 2.0)
        await p.app.fleet.refresh(adapter)
        await until(lambda: not any(map(len, (m.slots._unloading for m in p.members))))
        held = [vllm.lora_names for vllm in (fake, other, third)]
        assert sorted(held) == [[], [new], [new]]


async def test_a_stream_ends_on_the_weights_that_it_began_on(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, adapters={"sql": str(folder)}, **WATCHING) as p:
        old = named(folder)
        fake.stream_gate.shut()
        async with p.session.post(p.url + CHAT, json=chat("sql", stream=True)) as streaming:
            await fake.until(lambda: fake.stream_gate.waiting == 1)
            new = changed(folder, 2.0)
            await until(lambda: present(p) == new)
            assert speaker(await p.ask("sql")) == new
            assert fake.unloads == []  # its last lease is the stream's
            fake.stream_gate.open()
            events = (await streaming.read()).split(b"\n\n")
        assert events[-2] == b"data: [DONE]"
        said = [orjson.loads(event[6:]) for event in events[:-2]]
        text = "".join(
            one["choices"][0]["delta"].get("content", "") for one in said if one["choices"]
        )
        assert text.startswith(f"I am {old}.")
        assert {one["model"] for one in said} == {"sql"}
        await fake.until(lambda: fake.unloads == [old])


async def test_what_cannot_be_loaded_does_not_take_over(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, adapters={"sql": str(folder)}) as p:
        (adapter,) = p.app.fleet.catalog.adapters
        old = named(folder)
        await p.ask("sql")
        fake.disk[str(folder)] = OnDisk(refusal="vLLM does not yet support DoRA.")
        changed(folder, 2.0)
        for _ in range(3):
            await p.app.fleet.refresh(adapter)
            assert speaker(await p.ask("sql")) == old
        (said,) = p.faults  # once, not at every look
        assert "adapter 'sql' stays at its old version" in said
        assert "DoRA" in said
        assert fake.unloads == []
        del fake.disk[str(folder)]
        new = changed(folder, 3.0)
        await p.app.fleet.refresh(adapter)
        assert speaker(await p.ask("sql")) == new
        p.faults.clear()


async def test_files_that_are_still_being_written_are_looked_at_again(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, adapters={"sql": str(folder)}) as p:
        (adapter,) = p.app.fleet.catalog.adapters
        old = named(folder)
        await p.ask("sql")
        fake.load_gate.shut()
        changed(folder, 2.0)
        swap = asyncio.create_task(p.app.fleet.refresh(adapter))
        await fake.until(lambda: fake.load_gate.waiting == 1)
        new = changed(folder, 3.0)
        fake.load_gate.open()
        await swap
        assert speaker(await p.ask("sql")) == old  # nobody knows what the server has read
        assert fake.lora_names == [old]
        await p.app.fleet.refresh(adapter)
        assert speaker(await p.ask("sql")) == new


async def test_it_takes_over_where_it_can_be_loaded(
    fake: FakeVllm, other: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, other, adapters=[Adapter("sql", str(folder), replicas=2)]) as p:
        await until(lambda: fake.loras and other.loras)
        new = changed(folder, 2.0)
        other.inject(Reply(500, b"out of memory"), path=LOAD, times=1)
        await p.app.fleet.refresh(p.app.fleet.catalog.adapters[0])
        for _ in range(4):
            assert speaker(await p.ask("sql")) == new
        await other.until(lambda: not other.loras)


async def test_a_folder_that_is_gone_leaves_what_is_loaded(
    fake: FakeVllm, proxied: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with proxied(fake, adapters={"sql": str(folder)}) as p:
        old = named(folder)
        await p.ask("sql")
        fake.disk[str(folder)] = None
        (folder / "adapter_model.safetensors").unlink()
        await p.app.fleet.refresh(p.app.fleet.catalog.adapters[0])
        assert speaker(await p.ask("sql")) == old
        assert fake.unloads == []
        p.faults.clear()


async def test_one_slot_is_enough(fake: FakeVllm, proxied: Start, folder: Path) -> None:
    """While an answer holds the only slot, too: the two stand side by side for a moment."""
    upstream = {"max_cpu_loras": 1}
    async with proxied(fake, adapters={"sql": str(folder)}, upstream=upstream, **WATCHING) as p:
        fake.answer_gate.shut()
        asked = asyncio.create_task(p.ask("sql"))
        await fake.until(lambda: fake.running == 1)
        old, new = named(folder), changed(folder, 2.0)
        await until(lambda: present(p) == new)
        fake.answer_gate.open()
        assert speaker(await asked) == old
        assert speaker(await p.ask("sql")) == new
        await fake.until(lambda: fake.lora_names == [new])


async def test_back_to_the_old_weights(fake: FakeVllm, proxied: Start, folder: Path) -> None:
    async with proxied(fake, adapters={"sql": str(folder)}, **WATCHING) as p:
        old = named(folder)
        for weight, again in ((2.0, 1.0), (3.0, 1.0)):
            assert speaker(await p.ask("sql")) == old
            new = changed(folder, weight)
            await until(lambda name=new: present(p) == name)  # type: ignore[misc]  # bound now
            assert speaker(await p.ask("sql")) == new
            assert changed(folder, again) == old
            await until(lambda: present(p) == old)
        assert speaker(await p.ask("sql")) == old
        await fake.until(lambda: fake.lora_names == [old])


async def test_the_same_weights_written_again_are_no_new_version(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, adapters={"sql": str(folder)}) as p:
        await p.ask("sql")
        write(folder)
        await p.app.fleet.refresh(p.app.fleet.catalog.adapters[0])
        await p.ask("sql")
        assert len(fake.loads) == 1


async def test_of_two_swaps_at_once_the_older_files_never_win(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, adapters={"sql": str(folder)}) as p:
        (adapter,) = p.app.fleet.catalog.adapters
        await p.ask("sql")
        fake.load_gate.shut()
        middle = changed(folder, 2.0)
        first = asyncio.create_task(p.app.fleet.refresh(adapter))
        await fake.until(lambda: fake.load_gate.waiting == 1)
        second = asyncio.create_task(p.app.fleet.refresh(adapter))
        await asyncio.sleep(0)
        fake.load_gate.open()
        await asyncio.gather(first, second)
        new = changed(folder, 3.0)
        await p.app.fleet.refresh(adapter)
        assert speaker(await p.ask("sql")) == new
        assert [name for name, _ in fake.loads].count(middle) == 1
        await fake.until(lambda: fake.lora_names == [new])


async def test_an_unpinned_adapter_is_not_spread_by_a_swap(
    fake: FakeVllm, other: FakeVllm, proxied: Start, folder: Path
) -> None:
    async with proxied(fake, other, adapters={"sql": str(folder)}, **WATCHING) as p:
        await p.ask("sql")
        new = changed(folder, 2.0)
        await until(lambda: present(p) == new)
        await until(lambda: sorted([fake.lora_names, other.lora_names]) == [[], [new]])
        await p.ask("sql")
        assert len(fake.loads + other.loads) == 2


async def test_a_pinned_adapter_stays_pinned_through_a_swap(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    adapters = [Adapter("sql", str(folder), pin=True), Adapter("pirate", "/adapters/pirate")]
    upstream = {"max_cpu_loras": 2}
    async with proxied(fake, adapters=adapters, upstream=upstream, **WATCHING) as p:
        old = named(folder)
        await until(lambda: p.members[0].slots.resident(old))
        new = changed(folder, 2.0)
        await until(lambda: present(p) == new)
        await fake.until(lambda: fake.lora_names == [new])
        for _ in range(2):
            await p.ask("pirate")
            await p.ask("sql")
        assert new not in fake.unloads


async def test_a_pinned_adapter_keeps_its_only_slot_through_a_swap(
    fake: FakeVllm, proxied: Start, folder: Path
) -> None:
    adapters = [Adapter("sql", str(folder), pin=True), Adapter("pirate", "/adapters/pirate")]
    upstream = {"max_cpu_loras": 1}
    async with proxied(fake, adapters=adapters, upstream=upstream, load_timeout=0.5) as p:
        old = named(folder)
        await until(lambda: p.members[0].slots.resident(old))  # its files have been looked at
        queued = asyncio.create_task(p.ask("pirate"))
        await until(lambda: p.members[0].slots.waiting == 1)
        new = changed(folder, 2.0)
        await p.app.fleet.refresh(p.app.fleet.catalog.adapters[0])
        assert speaker(await p.ask("sql")) == new
        assert (await queued).code == "adapter_load_timeout"
        assert [name for name, _ in fake.loads] == [old, new]
        await fake.until(lambda: fake.lora_names == [new])


# --- under load ----------------------------------------------------------------------------

SWAPS = 500
CLIENTS = 200
SPAN = 25  # swaps that one answer takes


class Slow(FakeVllm):
    """An answer begins on some weights and ends many swaps later.

    Attributes:
        swaps: So many so far.
        strangers: Requests for a name that it did not have when they came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.swaps = 0
        self.strangers: list[str] = []
        self._due: dict[int, asyncio.Event] = {}
        self.answer_gate = self  # type: ignore[assignment]  # its `passage` is what counts

    def swapped(self) -> None:
        self.swaps += 1
        if due := self._due.pop(self.swaps, None):
            due.set()

    async def passage(self) -> None:
        due = min(self.swaps + SPAN, SWAPS)
        if due > self.swaps:
            await self._due.setdefault(due, asyncio.Event()).wait()

    def _no_such_model(self, path: str, model: str) -> web.Response:
        self.strangers.append(model)
        return super()._no_such_model(path, model)


async def test_500_swaps_under_200_concurrent_requests(
    proxied: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request fails, none is sent twice, and each answer is of one content.

    Which is proven by names: the server never met one that it did not have, and whoever
    answers was present at some time between the question and its answer.
    """
    monkeypatch.setattr(versions, "RECHECK", 0.0)
    history = [named(folder)]  # the names that were present, in order
    wrong: list[object] = []
    asked = 0
    async with Slow() as fake, proxied(fake, adapters={"sql": str(folder)}) as p:

        async def client(number: int) -> None:
            nonlocal asked
            stream = number % 2 == 0
            while fake.swaps < SWAPS:
                since = len(history) - 1
                asked += 1
                answer = await p.ask("sql", stream=stream)
                allowed = {f"I am {name}." for name in history[since:]}
                text = heard(answer) if answer.status == 200 else ""
                if not any(map(text.startswith, allowed)):
                    wrong.append((answer.status, answer.body[:300]))

        clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
        await fake.until(lambda: fake.running == CLIENTS)
        (adapter,) = p.app.fleet.catalog.adapters
        for number in range(SWAPS):
            new = changed(folder, 2.0 + number)
            await p.app.fleet.refresh(adapter)
            assert present(p) == new
            history.append(new)
            fake.swapped()
        await asyncio.gather(*clients)
        await fake.until(lambda: fake.lora_names == [history[-1]])
        assert wrong == []
        assert fake.strangers == []
        assert await p.samples("lora_proxy_retries_total") == {}
        assert len(fake.requests_to(CHAT)) == asked
        assert asked >= CLIENTS * SWAPS / SPAN / 2
        assert [name for name, _ in fake.loads] == history
        assert sorted(fake.unloads) == sorted(history[:-1])


def heard(answer: Answer) -> str:
    """What an answer says, streamed or whole."""
    if not answer.body.startswith(b"data: "):
        assert answer.json["model"] == "sql"
        return str(answer.json["choices"][0]["message"]["content"])
    *events, done, end = answer.body.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    said = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
    assert {one["model"] for one in said} == {"sql"}
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in said)
