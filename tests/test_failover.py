"""What one upstream does wrong another makes good, within limits, before the first byte."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from fake_faults import CLOSE, Cut, Fault, Reply
from fake_vllm import FakeVllm
from proxied import CHAT, Answer, Proxied, Start, chat, until

from lora_proxy.health import Health
from lora_proxy.member import Member
from lora_proxy.settings import HealthSettings, RetrySettings

BUSY = b'{"error":{"message":"come back later","type":"Overloaded","code":429}}'


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    async with FakeVllm() as server:
        yield server


@pytest.fixture
def fakes(fake: FakeVllm, other: FakeVllm) -> Sequence[FakeVllm]:
    """`gpu-0` and `gpu-1`."""
    return fake, other


def busy(status: int, **headers: str) -> Reply:
    return Reply(status, BUSY, {"content-type": "application/json"} | headers)


def everywhere(fakes: Sequence[FakeVllm], fault: Fault, path: str = CHAT) -> None:
    for fake in fakes:
        fake.inject(fault, path=path)


def by(answer: Answer) -> str:
    """Which upstream answered."""
    return answer.headers["x-lora-proxy-upstream"]


def health(**settings: Any) -> HealthSettings:
    return HealthSettings(**{"pause": 0.05, "pause_most": 0.05, "ramp": 0.0} | settings)


def circuit(member: Member) -> str:
    return member.health.circuit.value


async def holder(p: Proxied, fakes: Sequence[FakeVllm], model: str = "sql") -> FakeVllm:
    """Asks once; returns who answered, and so will again."""
    return fakes[int(by(await p.ask(model))[-1])]


# --- which one answered --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_names_its_upstream(
    fakes: Sequence[FakeVllm], proxied: Start, *, stream: bool
) -> None:
    async with proxied(*fakes) as p:
        names = {by(await p.ask("sql", stream=stream)) for _ in range(3)}
        (name,) = names  # the adapter stays where it is
        assert fakes[int(name[-1])].loras
        assert not fakes[1 - int(name[-1])].loras
        assert "x-lora-proxy-upstream" not in (await p.ask("nobody")).headers


# --- the next one --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_upstream_is_left_alone_for_as_long_as_it_asks(
    fakes: Sequence[FakeVllm], proxied: Start, status: int
) -> None:
    async with proxied(*fakes) as p:
        first = await holder(p, fakes)
        first.inject(busy(status, **{"retry-after": "30"}), path=CHAT)
        answers = [await p.ask("sql") for _ in range(4)]
        assert {answer.status for answer in answers} == {200}
        assert {fakes[int(by(answer)[-1])] for answer in answers} == set(fakes) - {first}
        assert len(first.requests_to(CHAT)) == 2, "it was asked once more, and then left alone"
        held = p.members[fakes.index(first)]
        assert not held.usable
        assert 20 < (held.wait or 0) <= 30
        assert circuit(held) == "closed"


async def test_a_429_without_a_time_spills_and_is_no_fault(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes, health=health(fall=1)) as p:
        first = await holder(p, fakes)
        first.inject(busy(429), path=CHAT, times=1)
        assert (await p.ask("sql")).status == 200
        assert {circuit(member) for member in p.members} == {"closed"}
        assert all(member.usable for member in p.members)


@pytest.mark.parametrize("status", [429, 503])
async def test_the_last_ones_answer_is_passed_on_as_it_is(
    fakes: Sequence[FakeVllm], proxied: Start, status: int
) -> None:
    async with proxied(*fakes) as p:
        everywhere(fakes, busy(status, **{"retry-after": "7"}))
        answer = await p.ask("tiny")
        assert (answer.status, answer.body) == (status, BUSY)
        assert answer.headers["retry-after"] == "7"
        assert "x-lora-proxy-error" not in answer.headers
        assert sum(len(fake.requests_to(CHAT)) for fake in fakes) == 2


async def test_a_refused_connection_is_tried_elsewhere(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes) as p:
        first = await holder(p, fakes)
        await first.stop()
        answers = await asyncio.gather(*(p.ask("sql") for _ in range(5)))
        assert {answer.status for answer in answers} == {200}
        assert {fakes[int(by(answer)[-1])] for answer in answers} == set(fakes) - {first}
        await first.start()


@pytest.mark.parametrize(("status", "tried"), [(500, 1), (502, 2), (504, 1), (503, 2)])
async def test_what_is_sent_again(
    fakes: Sequence[FakeVllm], proxied: Start, status: int, tried: int
) -> None:
    async with proxied(*fakes) as p:
        everywhere(fakes, Reply(status, b"sick"))
        assert (await p.ask("tiny")).status == status
        assert sum(len(fake.requests_to(CHAT)) for fake in fakes) == tried


async def test_so_many_upstreams_are_tried_and_no_more(proxied: Start) -> None:
    async with FakeVllm() as a, FakeVllm() as b, FakeVllm() as c:
        fakes = a, b, c
        everywhere(fakes, busy(429))
        async with proxied(*fakes, retry=RetrySettings(attempts=2)) as p:
            assert (await p.ask("tiny")).status == 429
            assert sum(len(fake.requests_to(CHAT)) for fake in fakes) == 2


# --- the budget ----------------------------------------------------------------------------


async def test_without_a_budget_nothing_is_sent_again(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes, retry=RetrySettings(budget=0.0)) as p:
        everywhere(fakes, busy(429))
        answer = await p.ask("tiny")
        assert (answer.status, answer.body) == (429, BUSY), "the upstream's own answer"
        assert sum(len(fake.requests_to(CHAT)) for fake in fakes) == 1
        await fakes[0].stop()
        await fakes[1].stop()
        assert (await p.ask("tiny")).status == 502
        assert await p.samples("lora_proxy_retries_total") == {}
        for fake in fakes:
            await fake.start()


async def test_retries_are_a_share_of_traffic(fakes: Sequence[FakeVllm], proxied: Start) -> None:
    async with proxied(*fakes, retry=RetrySettings(budget=0.1)) as p:
        everywhere(fakes, busy(429))
        for _ in range(100):
            assert (await p.ask("tiny")).body == BUSY
        asked = sum(len(fake.requests_to(CHAT)) for fake in fakes)
        assert 110 <= asked <= 120  # a tenth, and the reserve of ten
        retries = await p.samples("lora_proxy_retries_total")
        assert sum(retries.values()) == asked - 100


# --- what may have begun to generate -------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_what_may_have_begun_is_not_sent_again(
    fakes: Sequence[FakeVllm], proxied: Start, *, stream: bool
) -> None:
    async with proxied(*fakes) as p:
        everywhere(fakes, CLOSE)
        answer = await p.ask("tiny", stream=stream)
        assert (answer.status, answer.code) == (502, "upstream_closed")
        assert sum(len(fake.requests_to(CHAT)) for fake in fakes) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_unless_the_operator_says_so(
    fakes: Sequence[FakeVllm], proxied: Start, *, stream: bool
) -> None:
    async with proxied(*fakes, retry=RetrySettings(replay_started=True)) as p:
        first = await holder(p, fakes)
        first.inject(CLOSE, path=CHAT)
        answer = await p.ask("sql", stream=stream)
        assert answer.status == 200
        assert fakes[int(by(answer)[-1])] is not first
        assert b'"model":"sql"' in answer.body


async def test_after_the_first_byte_nothing_is_sent_again(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes, retry=RetrySettings(replay_started=True)) as p:
        everywhere(fakes, Cut(2))
        answer = await p.ask("tiny", stream=True)
        assert answer.status == 200
        assert b"upstream_closed" in answer.body
        assert sum(len(fake.requests_to(CHAT)) for fake in fakes) == 1


# --- the circuit ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_sick_upstream_is_left_alone_after_so_many_failures(
    fakes: Sequence[FakeVllm], proxied: Start, status: int
) -> None:
    async with proxied(*fakes, health=health(fall=3, pause=60.0, pause_most=60.0)) as p:
        first = await holder(p, fakes)
        member = p.members[fakes.index(first)]
        first.inject(Reply(status, b"sick"), path=CHAT)
        for number in range(3):
            assert member.usable, number
            await p.ask("sql")
        assert circuit(member) == "open"
        assert not member.usable
        asked = len(first.requests_to(CHAT))
        for _ in range(3):
            assert (await p.ask("sql")).status == 200
        assert len(first.requests_to(CHAT)) == asked


@pytest.mark.parametrize("fault", [CLOSE, Cut(0), Cut(2)])
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_that_break_off_count(
    fake: FakeVllm, proxied: Start, fault: Fault, *, stream: bool
) -> None:
    fake.split = 20  # so that JSON, too, can break off in the middle
    async with proxied(fake, health=health(fall=1, pause=60.0, pause_most=60.0)) as p:
        fake.inject(fault, path=CHAT)
        with suppress(aiohttp.ClientPayloadError):  # a break in the middle of an event
            await p.ask("tiny", stream=stream)
        assert circuit(p.members[0]) == "open"


async def test_a_500_is_the_requests_fault_as_well_as_anybodys(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, health=health(fall=1)) as p:
        fake.inject(Reply(500, b"boom"), path=CHAT)
        for _ in range(3):
            assert (await p.ask("tiny")).status == 500
        assert circuit(p.members[0]) == "closed"


async def test_a_success_between_failures_starts_the_count_anew(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, health=health(fall=2)) as p:
        for _ in range(3):
            fake.inject(Reply(502, b"sick"), path=CHAT, times=1)
            assert (await p.ask("tiny")).status == 502
            assert (await p.ask("tiny")).status == 200
        assert circuit(p.members[0]) == "closed"


async def test_a_half_open_circuit_lets_few_through_and_closes(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, health=health(fall=1, trials=2)) as p:
        (member,) = p.members
        fake.inject(Reply(502, b"sick"), path=CHAT, times=1)
        await p.ask("tiny")
        await until(lambda: member.usable)
        assert circuit(member) == "half-open"
        fake.answer_gate.shut()
        trials = [asyncio.create_task(p.ask("tiny")) for _ in range(2)]
        await fake.until(lambda: fake.running == 2)
        refused = await asyncio.gather(*(p.ask("tiny") for _ in range(3)))
        assert {(answer.status, answer.code) for answer in refused} == {(503, "no_upstream")}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert fake.running == 2
        fake.answer_gate.open()
        assert {answer.status for answer in await asyncio.gather(*trials)} == {200}
        assert circuit(member) == "closed"


async def test_a_failed_trial_opens_it_again(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, health=health(fall=1)) as p:
        (member,) = p.members
        fake.inject(Reply(502, b"sick"), path=CHAT, times=2)
        for _ in range(2):
            await until(lambda: member.usable)
            assert (await p.ask("tiny")).status == 502
            assert circuit(member) == "open"
        await until(lambda: member.usable)
        assert (await p.ask("tiny")).status == 200


async def test_a_client_that_leaves_its_trial_leaves_its_place(
    fake: FakeVllm, proxied: Start
) -> None:
    async with proxied(fake, health=health(fall=1, trials=1)) as p:
        (member,) = p.members
        fake.inject(Reply(502, b"sick"), path=CHAT, times=1)
        await p.ask("tiny")
        await until(lambda: member.usable)
        fake.answer_gate.shut()
        trial = asyncio.create_task(p.ask("tiny"))
        await fake.until(lambda: fake.running == 1)
        assert not member.usable
        trial.cancel()
        await until(lambda: member.usable)
        fake.answer_gate.open()
        assert (await p.ask("tiny")).status == 200
        assert circuit(member) == "closed"


async def test_one_that_returns_starts_slowly(fakes: Sequence[FakeVllm], proxied: Start) -> None:
    async with proxied(*fakes, health=health(fall=1, ramp=3600.0, trials=1)) as p:
        first = await holder(p, fakes, "tiny")
        back, steady = p.members[fakes.index(first)], p.members[1 - fakes.index(first)]
        steady.health = Health(steady.health.thresholds, up=True)  # and has been for long
        first.inject(Reply(502, b"sick"), path=CHAT, times=1)
        await p.ask("tiny")
        await until(lambda: back.usable)
        await p.ask("tiny")
        assert circuit(back) == "closed"
        assert back.weight < 0.2 * steady.weight
        for fake in fakes:
            fake.answer_gate.shut()
        tasks = [asyncio.create_task(p.ask("tiny")) for _ in range(8)]
        await until(lambda: sum(fake.running for fake in fakes) == 8)
        assert first.running <= 1
        for fake in fakes:
            fake.answer_gate.open()
        await asyncio.gather(*tasks)


# --- nothing is usable ---------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_nothing_usable_is_a_503_that_says_when_to_come_back(
    fakes: Sequence[FakeVllm], proxied: Start, path: str
) -> None:
    async with proxied(*fakes) as p:
        for fake, seconds in zip(fakes, ("40", "20"), strict=True):
            fake.inject(busy(503, **{"retry-after": seconds}), path=path)
        await p.post(path, chat("tiny", max_tokens=5))
        answer = await p.post(path, chat("tiny", max_tokens=5))
        assert (answer.status, answer.code) == (503, "no_upstream")
        assert int(answer.headers["retry-after"]) in range(18, 21)  # the sooner of the two
        if path == CHAT:
            assert answer.json["error"]["code"] == "no_upstream"
            assert answer.json["error"]["type"] == "server_error"
        else:
            assert answer.json["type"] == "error"
            assert answer.json["error"]["type"] == "overloaded_error"
        assert (await p.get("/ready")).status == 503


async def test_everybody_down_is_a_503_as_well(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake, probe_interval=0.01, health=health(fall=1)) as p:
        await fake.stop()
        await until(lambda: not p.members[0].health.up)
        answer = await p.ask("tiny")
        assert (answer.status, answer.code) == (503, "no_upstream")
        assert int(answer.headers["retry-after"]) >= 1
        await fake.start()
        await until(lambda: p.members[0].usable)
        assert (await p.ask("tiny")).status == 200


# --- down, and back ------------------------------------------------------------------------


async def test_a_restarted_upstream_is_reconciled_without_a_request(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    async with proxied(*fakes, probe_interval=0.01) as p:
        first = await holder(p, fakes)
        member = p.members[fakes.index(first)]
        served = first.lora_names[0]
        asked = len(first.requests_to(CHAT))
        first.restart()
        await until(lambda: not member.slots.resident(served))
        first.loras[served] = "/adapters/sql"  # another replica of the proxy loads it
        await until(lambda: member.slots.resident(served))
        assert len(first.requests_to(CHAT)) == asked


async def test_one_dies_under_load_and_nobody_notices(
    fakes: Sequence[FakeVllm], proxied: Start
) -> None:
    """What it has answered with nothing yet is a 502 at worst; what comes later is a 200."""
    retry = RetrySettings(replay_started=True, budget=1.0)
    async with proxied(*fakes, probe_interval=0.02, retry=retry, health=health()) as p:
        first = await holder(p, fakes)
        member = p.members[fakes.index(first)]
        first.answer_gate.shut()
        tasks = [asyncio.create_task(p.ask("sql", stream=n % 2 == 0)) for n in range(10)]
        await first.until(lambda: first.running == 10)
        await first.stop()
        first.restart()
        assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}
        first.answer_gate.open()
        await first.start()
        await until(lambda: member.usable)
        assert all([(await p.ask("sql")).status == 200 for _ in range(5)])
