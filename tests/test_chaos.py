"""Every bad habit of an upstream in every phase of a request: exactly one answer, nothing left.

First a table, habit by phase, with what must come of each; then schedules that nobody thought
of. The client here parses strictly (h11), so that an answer which is cut short, doubled, or
followed by a stray byte is none. That leases, waiters, tasks and connections are gone in the
end is asserted by `proxied`.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, Self

import h11
import orjson
import pytest
from fake_vllm import CLOSE, HANG, Cut, FakeVllm, OnDisk, Raw, Reply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxied import CHAT, PATIENCE, Proxied, Start, chat, until
from raw_server import RawConnection, RawServer, Script

from lora_proxy import member
from lora_proxy.errors import CODES
from lora_proxy.settings import HealthSettings, QueueSettings, RetrySettings, RoutingSettings
from lora_proxy.types import Adapter, Route

Fault = Raw | Reply | Cut

MODELS, LOAD, UNLOAD = "/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + CHUNKED
EVENTS_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + CHUNKED
EVENT = b'data: {"model":"tiny","choices":[]}\n\n'
PAGE = b"<html>The proxy in front of the server speaks.</html>"
UNKNOWN = re.compile(r"The model `[\w-]+` does not exist")  # what vLLM says of one it has not

ADAPTERS = {name: f"/adapters/{name}" for name in ("sql", "pirate", "poet")}


def in_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


# --- a client that believes nothing --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        model: The public name.
        stream: Whether it wants events.
        prompt: Comes back in a right answer, and is nobody else's.
        speakers: Whose served names may be in a right answer; as `model` unless it is a route.
    """

    model: str
    stream: bool
    prompt: str
    speakers: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        """Whether this is what the fake says when the right model is asked the right thing."""
        match = re.fullmatch(r"I am (\w+)(@[0-9a-f]{8})?\. You said: (.*)", text)
        if match is None or match[3] != self.prompt:
            return False
        return match[1] in (self.speakers or (self.model,)) and (match[1] == "tiny") != bool(
            match[2]
        )


@dataclass(slots=True)
class Outcome:
    """What came of one request: all that arrived, and whether HTTP calls it whole."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False


class Client:
    """One connection to the proxy, kept as long as both sides keep it."""

    def __init__(self, p: Proxied) -> None:
        self._p = p
        self._parser = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> Self:
        self._connected = self._p.connected()
        self._reader, self._writer = await self._connected.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connected.__aexit__(None, None, None)

    @property
    def kept(self) -> bool:
        """Whether it can be asked on."""
        return self._parser.our_state is h11.IDLE

    async def ask(
        self, asked: Asked, *, leaves_after: int | None = None, at_once: int = 1 << 16
    ) -> Outcome | None:
        """Sends one request and reads the one answer.

        Args:
            asked: What.
            leaves_after: Bytes of answer after which the client goes away.
            at_once: Bytes that it reads at a time.

        Returns:
            None if it went away.
        """
        body = orjson.dumps(chat(asked.model, asked.prompt, stream=asked.stream))
        fields = [("host", "proxy"), ("content-type", "application/json")]
        fields.append(("content-length", str(len(body))))
        send = self._parser.send
        head = send(h11.Request(method="POST", target=CHAT, headers=fields))
        self._writer.write(head + send(h11.Data(body)) + send(h11.EndOfMessage()))
        received = 0
        outcome = Outcome()
        try:
            while (event := self._parser.next_event()) is not h11.PAUSED:
                match event:
                    case h11.NEED_DATA:
                        if leaves_after is not None and received >= leaves_after:
                            return None
                        data = await self._reader.read(at_once)
                        received += len(data)
                        self._parser.receive_data(data)
                    case h11.Response():
                        outcome.status = event.status_code
                        outcome.headers = {k.decode(): v.decode() for k, v in event.headers}
                    case h11.Data():
                        outcome.body += event.data
                    case h11.EndOfMessage():
                        outcome.whole = True
                        break
        except (h11.RemoteProtocolError, ConnectionResetError):
            return outcome
        await self._end()
        return outcome

    async def _end(self) -> None:
        """Nothing may follow."""
        if self._parser.our_state is h11.MUST_CLOSE or self._parser.their_state in (
            h11.MUST_CLOSE,
            h11.CLOSED,
        ):
            assert await self._reader.read() == b""
        assert self._parser.trailing_data[0] == b""
        if self._parser.our_state is h11.DONE and self._parser.their_state is h11.DONE:
            self._parser.start_next_cycle()


def verdict(outcome: Outcome, asked: Asked) -> str:
    """Which of the ends that a request may have this is; fails for any other.

    Returns:
        "answered"; the code of the proxy's error; "event CODE" if it came in the stream;
        "broken"; or the status of an upstream's own answer that is not the right one.
    """
    assert outcome.status, "no answer at all"
    code = outcome.headers.get("x-lora-proxy-error")
    if code is not None:
        assert outcome.whole
        assert outcome.status == CODES[code].status
        assert_error(outcome.body, code)
        assert ("retry-after" in outcome.headers) >= (code in {"no_upstream", "queue_full"})
        return code
    assert outcome.headers["x-lora-proxy-upstream"].startswith("gpu-")
    if outcome.body in (PAGE, b""):
        assert outcome.whole
        return str(outcome.status)
    if outcome.status == 404:
        message = orjson.loads(outcome.body)["error"]["message"]
        assert UNKNOWN.match(message), message
        return "404"
    assert outcome.status == 200
    # A sick upstream may send events to whom asked for none; they must end well all the same.
    events = outcome.headers["content-type"].startswith("text/event-stream")
    return streamed(outcome, asked) if events else whole(outcome, asked)


def assert_error(body: bytes, code: str) -> None:
    (error,) = orjson.loads(body).values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]


def whole(outcome: Outcome, asked: Asked) -> str:
    assert outcome.whole, "JSON is sent when all of it is there"
    assert not asked.stream
    body = orjson.loads(outcome.body)
    assert body["model"] == asked.model
    assert asked.is_right(body["choices"][0]["message"]["content"]), outcome.body
    return "answered"


def streamed(outcome: Outcome, asked: Asked) -> str:
    *events, rest = outcome.body.split(b"\n\n")
    assert not any(event.startswith(b'data: {"error"') for event in events[:-1])
    assert b"data: [DONE]" not in events[:-1]
    if not outcome.whole:
        assert b"data: [DONE]" not in events
        return "broken"
    assert rest == b"", "half an event looks whole"
    last = events[-1].removeprefix(b"data: ")
    if last == b"[DONE]":
        chunks = [orjson.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
        assert {chunk["model"] for chunk in chunks} == {asked.model}
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert asked.stream
        assert asked.is_right(text), text
        return "answered"
    code = orjson.loads(last)["error"]["code"]
    assert_error(last, code)
    return f"event {code}"


async def end_of(p: Proxied, asked: Asked) -> str:
    """Asks once, on a connection of its own."""
    async with asyncio.timeout(PATIENCE), Client(p) as client:
        outcome = await client.ask(asked)
        assert outcome is not None
        return verdict(outcome, asked)


_numbers = count()


def asking(model: str, *, stream: bool = False, speakers: tuple[str, ...] = ()) -> Asked:
    return Asked(model, stream, f"question {next(_numbers)}", speakers)


# --- the table -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    """Where an upstream is when its habit shows.

    Attributes:
        doing: What the proxy wants of it.
        path: What it is asked.
        begun: What it has said by then.
        stream: Whether the client wants events.
    """

    doing: Literal["probe", "models", "load", "unload", "forward"]
    path: str
    begun: bytes = b""
    stream: bool = False

    @property
    def has_reached_the_client(self) -> bool:
        return self.begun.startswith(EVENTS_HEAD)


BEGUN = {"": b"", ", in the head": JSON_HEAD[:30], ", in the body": JSON_HEAD + in_chunk(b'{"id"')}
PHASES = {
    **{f"health probe{where}": Phase("probe", "/health", begun) for where, begun in BEGUN.items()},
    **{f"models probe{where}": Phase("probe", MODELS, begun) for where, begun in BEGUN.items()},
    **{f"models{where}": Phase("models", MODELS, begun) for where, begun in BEGUN.items()},
    **{f"load{where}": Phase("load", LOAD, begun) for where, begun in BEGUN.items()},
    **{f"unload{where}": Phase("unload", UNLOAD, begun) for where, begun in BEGUN.items()},
    **{f"forward{where}": Phase("forward", CHAT, begun) for where, begun in BEGUN.items()},
    "stream": Phase("forward", CHAT, stream=True),
    "stream, in the head": Phase("forward", CHAT, EVENTS_HEAD[:30], stream=True),
    "stream, before its first event": Phase("forward", CHAT, EVENTS_HEAD, stream=True),
    "stream, between events": Phase("forward", CHAT, EVENTS_HEAD + in_chunk(EVENT), stream=True),
    "stream, in an event": Phase("forward", CHAT, EVENTS_HEAD + in_chunk(EVENT[:20]), stream=True),
}

Habit = str
BREAKS: dict[Habit, str] = {
    "closes": "upstream_closed",
    "talks rubbish": "upstream_invalid",
    "falls silent": "upstream_timeout",
}
STATUSES = (200, 404, 429, 500, 502, 503, 504)
ELSEWHERE = {429, 502, 503}  # of these a request is taken to the next upstream

NOT_LOADED = {
    "adapter_load_failed",
    "adapter_load_timeout",
    "runtime_updating_disabled",
    "upstream_closed",
    "upstream_connect",
    "upstream_invalid",
    "upstream_timeout",
}

Fleet = Literal["one", "two", "two, replaying"]


def fault_of(phase: Phase, habit: Habit | int) -> Fault:
    match habit:
        case "closes":
            return Raw(phase.begun)
        case "talks rubbish":
            return Raw(phase.begun + b"\x00\xff rubbish\r\n\r\n")
        case "falls silent":
            return Raw(phase.begun, then="hang")
        case int(status):
            return Reply(status, PAGE, {"content-type": "text/html"})
    raise AssertionError(habit)


def allowed(phase: Phase, habit: Habit | int, fleet: Fleet) -> set[str]:
    """How a request may end that meets this.

    1. A probe is no request's business, and an unload only while its slot is waited for.
    2. Nothing has been generated during a load: another upstream makes it good, if there is
       one. Who claims to have loaded is believed, then asked once more, then quoted.
    3. An answer that is none of ours is passed on, or left for another's where that is
       allowed.
    4. After the first byte the client learns that this is not the whole.
    5. What broke off before it may have begun to generate: another one is only asked if the
       operator says so, and never after what was no HTTP.
    """
    other = fleet != "one"
    match phase.doing:
        case "probe":  # 1
            return {"answered"}
        case "unload":
            lost = habit == "falls silent" and not other
            return {"adapter_load_timeout"} if lost else {"answered"}
        case "load" if habit == 200:  # 2
            return {"404"}
        case "load" | "models":
            return {"answered"} if other else NOT_LOADED
    if isinstance(habit, int):  # 3
        return {"answered"} if other and habit in ELSEWHERE else {str(habit)}
    code = BREAKS[habit]
    if phase.has_reached_the_client:  # 4
        return {"broken"} if phase is PHASES["stream, in an event"] else {f"event {code}"}
    if fleet == "two, replaying" and habit != "talks rubbish":  # 5
        return {"answered"}
    return {code}


async def assert_ends_well(
    phase: Phase, habit: Habit | int, fleet: Fleet, proxied: Start, **options: Any
) -> None:
    """Three clients meet the habit at once; then the upstream is well again, and asked on."""
    sizes = {"max_cpu_loras": 1} if phase.doing == "unload" else {}
    interval = 0.02 if phase.doing == "probe" else 3600.0
    async with (
        upstreams(1 if fleet == "one" else 2) as fakes,
        proxied(
            *fakes,
            adapters=ADAPTERS,
            upstream=sizes,
            probe_interval=interval,
            health=HealthSettings(fall=100),
            retry=RetrySettings(replay_started=fleet == "two, replaying"),
            **options,
        ) as p,
    ):
        sick = await the_first_choice(p, fakes, "sql")
        if phase.doing in ("probe", "forward"):
            assert await end_of(p, asking("sql")) == "answered"
        if phase.doing == "unload":
            for number, name in enumerate(ADAPTERS.keys() - {"sql"}):
                await fill(p, number % len(fakes), name)
        sick.inject(fault_of(phase, habit), path=phase.path)
        if phase.doing == "probe":
            met = len(sick.requests_to(phase.path))
            await sick.until(lambda: len(sick.requests_to(phase.path)) > met)
        asked = [asking("sql", stream=phase.stream) for _ in range(3)]
        ends = await asyncio.gather(*(end_of(p, one) for one in asked))
        assert set(ends) <= allowed(phase, habit, fleet)
        assert sick.requests_to(phase.path)
        sick.clear_faults()
        sick.drop_connections()
        for model in ("tiny", "poet"):
            assert await end_of(p, asking(model)) == "answered"


@asynccontextmanager
async def upstreams(number: int) -> AsyncIterator[list[FakeVllm]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeVllm()) for _ in range(number)]


async def the_first_choice(p: Proxied, fakes: Sequence[FakeVllm], name: str) -> FakeVllm:
    choices = await p.app.fleet.route(p.app.fleet.catalog.adapter(name))
    return fakes[int(choices[0].member.name.removeprefix("gpu-"))]


async def fill(p: Proxied, place: int, name: str) -> None:
    """Has an adapter resident on this one upstream."""
    names = [one.name for one in p.members]
    for number, one in enumerate(names):
        p.app.fleet.drain(one, draining=number != place)
    assert await end_of(p, asking(name)) == "answered"
    for one in names:
        p.app.fleet.drain(one, draining=False)


@pytest.mark.parametrize("fleet", ["one", "two", "two, replaying"])
@pytest.mark.parametrize("habit", ["closes", "talks rubbish"])
@pytest.mark.parametrize("phase", PHASES)
async def test_it_breaks(fleet: Fleet, habit: Habit, phase: str, proxied: Start) -> None:
    await assert_ends_well(PHASES[phase], habit, fleet, proxied)


@pytest.mark.parametrize("fleet", ["one", "two", "two, replaying"])
async def test_it_falls_silent(fleet: Fleet, proxied: Start) -> None:
    """In all phases at the same time, because silence takes its time."""

    async def case(name: str) -> None:
        times: dict[str, Any] = {"timeouts": {"read": 4.0}, "load_timeout": 4.0}
        try:
            await assert_ends_well(PHASES[name], "falls silent", fleet, proxied, **times)
        except BaseException as error:
            error.add_note(f"phase: {name}")
            raise

    async with asyncio.TaskGroup() as group:
        for name in PHASES:
            group.create_task(case(name))


@pytest.mark.parametrize("fleet", ["one", "two"])
@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("phase", [name for name, phase in PHASES.items() if not phase.begun])
async def test_it_answers_something_else(
    fleet: Fleet, status: int, phase: str, proxied: Start
) -> None:
    await assert_ends_well(PHASES[phase], status, fleet, proxied)


# --- a server that is odd in every phase ---------------------------------------------------


async def refuse(sick: FakeVllm) -> None:
    await sick.stop()


async def hang_up_on_connect(sick: FakeVllm) -> None:
    sick.accepting = False
    sick.drop_connections()


async def forget(sick: FakeVllm) -> None:
    sick.restart()


async def forget_quietly(sick: FakeVllm) -> None:
    sick.restart(drop_connections=False)


async def take_no_loads(sick: FakeVllm) -> None:
    sick.restart()
    sick.inject(Reply(404, {"detail": "Not Found"}), path=LOAD)


async def have_a_rival(sick: FakeVllm) -> None:
    for name, path in sick.loras.items():
        sick.add_rival(name, path)
    sick.restart()


async def drip(sick: FakeVllm) -> None:
    sick.split = 1


async def hang_up_after_each(sick: FakeVllm) -> None:
    sick.hang_up = "silent"


async def announce_the_end_of_each(sick: FakeVllm) -> None:
    sick.hang_up = "announced"


Odd = Callable[[FakeVllm], Awaitable[None]]
FINE: tuple[Odd, ...] = (
    forget,
    forget_quietly,
    have_a_rival,
    drip,
    hang_up_after_each,
    announce_the_end_of_each,
)
ODD: dict[Odd, set[str]] = {
    **{odd: {"answered"} for odd in FINE},
    refuse: {"upstream_connect", "no_upstream"},
    hang_up_on_connect: {"upstream_closed"},
    take_no_loads: {"runtime_updating_disabled"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fleet", ["one", "two"])
@pytest.mark.parametrize("odd", ODD)
async def test_it_is_odd(fleet: Fleet, odd: Odd, proxied: Start, *, stream: bool) -> None:
    async with (
        upstreams(1 if fleet == "one" else 2) as fakes,
        proxied(*fakes, adapters=ADAPTERS, health=HealthSettings(fall=100)) as p,
    ):
        sick = await the_first_choice(p, fakes, "sql")
        assert await end_of(p, asking("sql")) == "answered"
        await odd(sick)
        asked = [asking("sql", stream=stream) for _ in range(3)]
        ends = await asyncio.gather(*(end_of(p, one) for one in asked))
        # What was closed without a word may have begun to generate, as far as we can see.
        helped = fleet == "two" and odd is not hang_up_on_connect
        assert set(ends) <= ({"answered"} if helped else ODD[odd])
        if odd is refuse:
            await sick.start()


async def resets(peer: RawConnection) -> None:
    peer.reset()


async def greets(peer: RawConnection) -> None:
    await peer.send(b"SSH-2.0-OpenSSH_9.6\r\n")
    await peer.until_closed()


async def answers_twice(peer: RawConnection) -> None:
    while await peer.request():
        await peer.send(2 * b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")


async def never_ends_its_head(peer: RawConnection) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await peer.send(b"x: y\r\n" * 1000)


async def says_nothing_and_leaves(peer: RawConnection) -> None:
    await peer.request()


STRANGERS = (resets, greets, answers_twice, never_ends_its_head, says_nothing_and_leaves)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stranger", STRANGERS)
async def test_what_is_no_vllm_gets_no_requests(
    fake: FakeVllm, proxied: Start, stranger: Script, *, stream: bool
) -> None:
    async with (
        RawServer(stranger) as server,
        proxied(server, fake, upstream={"base_model": "tiny"}) as p,
    ):
        for model in ("tiny", "sql", "pirate", "tiny"):
            assert await end_of(p, asking(model, stream=stream)) == "answered"
        assert not any(request.startswith(b"POST") for request in server.requests)


@pytest.mark.parametrize("fleet", ["one", "two, replaying"])
@pytest.mark.parametrize("phase", [name for name, phase in PHASES.items() if phase.path == CHAT])
async def test_it_resets_the_connection(fleet: Fleet, phase: str, proxied: Start) -> None:
    where = PHASES[phase]

    async def script(peer: RawConnection) -> None:
        while not (request := await peer.request()).startswith(b"POST"):
            body = b'{"data":[{"id":"tiny"}]}' if MODELS.encode() in request else b""
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await peer.send(where.begun)
        peer.reset()

    async with (
        RawServer(script) as server,
        upstreams(0 if fleet == "one" else 1) as others,
        proxied(
            server,
            *others,
            retry=RetrySettings(replay_started=True),
            health=HealthSettings(fall=100),
            routing=RoutingSettings("round-robin"),
        ) as p,
    ):
        ends = {await end_of(p, asking("tiny", stream=where.stream)) for _ in range(4)}
        assert any(request.startswith(b"POST") for request in server.requests)
    # What it had said may be lost with the connection; every second one is the other's.
    lost = {"upstream_closed"} if fleet == "one" else {"answered"}
    assert ends <= allowed(where, "closes", fleet) | lost


# --- schedules -----------------------------------------------------------------------------

EITHER = Route(
    "either",
    (("sql", 1.0), ("pirate", 1.0)),
    fallback=("poet", "tiny"),
    mirror="pirate",
    sample=0.5,
)
SPEAKERS = {"either": ("sql", "pirate", "poet", "tiny")}
NEVER = "broken"  # an adapter that vLLM refuses


@dataclass(frozen=True, slots=True)
class Visit:
    """A client that asks twice on one connection.

    Attributes:
        model: Whom.
        stream: Whether for events.
        leaves_after: Bytes of the second answer after which it goes away; None is never.
        at_once: Bytes that it reads at a time.
    """

    model: str
    stream: bool
    leaves_after: int | None
    at_once: int


@dataclass(frozen=True, slots=True)
class Injury:
    """A fault of one fake for some requests."""

    place: int
    path: str
    fault: Fault
    times: int


@dataclass(frozen=True, slots=True)
class Act:
    """Something that happens to one fake."""

    place: int
    what: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Turns of the loop in which the others go on."""

    turns: int


Move = Visit | Injury | Act | Pause

DEEDS = (
    *("clear", "restart", "forget", "drop", "rival", "drain", "return"),
    *("refuse", "accept", "hang_up", "keep"),
    *("shut_load", "open_load", "shut_answer", "open_answer", "shut_stream", "open_stream"),
)

paths = st.sampled_from([*sorted({phase.path for phase in PHASES.values()}), CHAT, LOAD, MODELS])
faults = st.one_of(
    st.sampled_from(sorted({phase.begun for phase in PHASES.values()})).flatmap(
        lambda begun: st.sampled_from(
            [Raw(begun), Raw(begun, then="hang"), Raw(begun + b"\x00\xff rubbish\r\n\r\n")]
        )
    ),
    st.sampled_from([CLOSE, HANG, Cut(0), Cut(1), Cut(3)]),
    st.sampled_from(STATUSES).map(lambda status: Reply(status, PAGE)),
    st.sampled_from([429, 503]).map(lambda status: Reply(status, PAGE, {"retry-after": "1"})),
)
places = st.integers(0, 2)
visits = st.builds(
    Visit,
    model=st.sampled_from(["sql", "pirate", "poet", "tiny", "either", NEVER]),
    stream=st.booleans(),
    leaves_after=st.none() | st.none() | st.integers(0, 3000),
    at_once=st.sampled_from([1 << 16, 64]),
)
injuries = st.builds(Injury, places, paths, faults, st.integers(1, 6))
acts = st.builds(
    Act,
    places,
    st.sampled_from(DEEDS),
)
pauses = st.builds(Pause, st.integers(1, 60))


@st.composite
def schedules(draw: st.DrawFn) -> list[Move]:
    """Ten to thirty requests, and what happens meanwhile."""
    moves: list[Move] = draw(st.lists(visits, min_size=5, max_size=15))
    moves += draw(st.lists(injuries, min_size=2, max_size=10))
    moves += draw(st.lists(acts, max_size=10))
    moves += draw(st.lists(pauses, min_size=3, max_size=10))
    return draw(st.permutations(moves))


features = st.fixed_dictionaries(
    {
        "upstream": st.fixed_dictionaries(
            {
                "base_model": st.just("tiny"),
                "max_in_flight": st.none() | st.integers(1, 3),
                "max_cpu_loras": st.integers(1, 2),
            }
        ),
        "retry": st.builds(
            RetrySettings,
            attempts=st.integers(1, 3),
            budget=st.sampled_from([0.0, 0.2, 1.0]),
            replay_started=st.booleans(),
        ),
        "queue": st.builds(
            QueueSettings, length=st.sampled_from([0, 3, 100]), timeout=st.just(0.4)
        ),
        "routing": st.builds(
            RoutingSettings,
            policy=st.sampled_from(
                ["lora-affinity", "least-loaded", "round-robin", "prefix-affinity"]
            ),
            spill_floor=st.sampled_from([0, 16]),
        ),
        "warm_up": st.booleans(),
        "mirror_limit": st.integers(1, 3),
    }
)


class Schedule:
    """Plays moves with a proxy and its fakes."""

    def __init__(self, p: Proxied, fakes: Sequence[FakeVllm]) -> None:
        self._p = p
        self._fakes = fakes
        self._visits: list[asyncio.Task[None]] = []
        self.asked = 0
        self.stayed = 0

    async def play(self, moves: Sequence[Move]) -> None:
        """Carries the moves out, and waits for the end of every visit."""
        for move in moves:
            await self._make(move)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self._visits)

    async def _make(self, move: Move) -> None:
        match move:
            case Visit():
                self._visits.append(asyncio.create_task(self._visit(move)))
            case Injury(place, path, fault, times):
                self._at(place).inject(fault, path=path, times=times)
            case Act(place, what):
                self._act(self._at(place), what)
            case Pause(turns):
                for _ in range(turns):
                    await asyncio.sleep(0)

    def _at(self, place: int) -> FakeVllm:
        return self._fakes[place % len(self._fakes)]

    async def _visit(self, visit: Visit) -> None:
        async with Client(self._p) as client:
            for leaves_after in (None, visit.leaves_after):
                if not client.kept:
                    return
                asked = asking(
                    visit.model, stream=visit.stream, speakers=SPEAKERS.get(visit.model, ())
                )
                self.asked += 1
                outcome = await client.ask(asked, leaves_after=leaves_after, at_once=visit.at_once)
                if outcome is None:
                    return
                self.stayed += 1
                end = verdict(outcome, asked)
                assert visit.model != NEVER or end != "answered"

    def _act(self, fake: FakeVllm, what: str) -> None:  # noqa: C901  # a table
        match what:
            case "clear":
                fake.clear_faults()
            case "restart":
                fake.restart()
            case "forget":
                fake.restart(drop_connections=False)
            case "drop":
                fake.drop_connections()
            case "refuse" | "accept":
                fake.accepting = what == "accept"
            case "hang_up" | "keep":
                fake.hang_up = "silent" if what == "hang_up" else None
            case "rival":
                for name, path in fake.loras.items():
                    fake.add_rival(name, path)
                fake.restart()
            case "shut_load" | "shut_answer" | "shut_stream":
                getattr(fake, what.removeprefix("shut_") + "_gate").shut()
            case "open_load" | "open_answer" | "open_stream":
                getattr(fake, what.removeprefix("open_") + "_gate").open()
            case "drain" | "return":
                self._p.app.fleet.drain(f"gpu-{self._fakes.index(fake)}", draining=what == "drain")

    def heal(self) -> None:
        """All is well again."""
        for fake in self._fakes:
            for what in ("clear", "accept", "keep", "return", "drop"):
                self._act(fake, what)
            for gate in (fake.load_gate, fake.answer_gate, fake.stream_gate):
                gate.open()

    async def assert_well(self) -> None:
        """Soon every upstream is usable, and every model answers."""
        await until(lambda: all(one.usable for one in self._p.members), "a fleet that is well")
        for model in ("tiny", *ADAPTERS, "either"):
            for stream in (False, True):
                await self._assert_answers(model, stream=stream)

    async def _assert_answers(self, model: str, *, stream: bool) -> None:
        """In the end; what failed meanwhile is left alone for a while."""
        ends = []
        async with asyncio.timeout(PATIENCE):
            while "answered" not in ends:
                ends.append(
                    await end_of(
                        self._p, asking(model, stream=stream, speakers=SPEAKERS.get(model, ()))
                    )
                )
                self.asked += 1
                self.stayed += 1


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(number=st.integers(2, 3), features=features, moves=schedules())
async def test_whatever_happens_each_request_has_one_end(
    number: int, features: dict[str, Any], moves: list[Move], proxied: Start
) -> None:
    adapters = [Adapter(name, path) for name, path in {**ADAPTERS, NEVER: "/adapters/no"}.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "BACKOFF_FIRST", 0.02)
        patch.setattr(member, "BACKOFF_MOST", 0.1)
        async with (
            upstreams(number) as fakes,
            proxied(
                *fakes,
                adapters=adapters,
                routes=(EITHER,),
                timeouts={"read": 0.3},
                load_timeout=0.4,
                probe_interval=0.05,
                health=HealthSettings(fall=2, pause=0.05, pause_most=0.1, ramp=0.0),
                **features,
            ) as p,
        ):
            for fake in fakes:
                fake.disk["/adapters/no"] = OnDisk(refusal="vLLM does not yet support DoRA.")
            schedule = Schedule(p, fakes)
            await schedule.play(moves)
            schedule.heal()
            await schedule.assert_well()
            await p.idle()
            counted = await p.samples("lora_proxy_requests_total")
            finished = sum(
                value for labels, value in counted.items() if "/v1/chat/completions" in labels
            )
            assert schedule.stayed <= finished <= schedule.asked
