"""The faults of the fake servers: a test that sets one must get exactly that one."""

import asyncio

import aiohttp
import pytest
from fake_vllm import CLOSE, HANG, Cut, FakeVllm, OnDisk, Raw, Reply
from raw_server import RawConnection, RawServer

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def http() -> aiohttp.ClientSession:
    async with aiohttp.ClientSession() as session:
        yield session


async def load(http: aiohttp.ClientSession, fake: FakeVllm, name: str) -> int:
    body = {"lora_name": name, "lora_path": f"/adapters/{name}"}
    async with http.post(f"{fake.url}/v1/load_lora_adapter", json=body) as response:
        return response.status


async def chat(http: aiohttp.ClientSession, fake: FakeVllm, **changes: object) -> bytes:
    async with http.post(fake.url + CHAT, json=BODY | changes) as response:
        return await response.read()


async def test_it_records_what_arrived(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    await http.post(f"{fake.url}{CHAT}?a=%20b", json=BODY, headers={"x-mine": "1"})
    (seen,) = fake.requests_to(CHAT)
    assert (seen.method, seen.path, seen.headers["X-Mine"]) == ("POST", f"{CHAT}?a=%20b", "1")
    assert seen.json == BODY


async def test_an_answer_echoes_its_request(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    assert b"I am tiny. You said: Hello" in await chat(http, fake)


async def test_loads_wait_at_a_gate(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    fake.load_gate.shut()
    loads = [asyncio.create_task(load(http, fake, name)) for name in ("a", "b")]
    await fake.until(lambda: fake.load_gate.waiting == 2)
    assert fake.lora_names == []
    fake.load_gate.let(1)
    await fake.until(lambda: fake.load_gate.waiting == 1)
    assert len(fake.lora_names) == 1
    fake.load_gate.open()
    assert await asyncio.gather(*loads) == [200, 200]


async def test_a_load_survives_its_client(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    fake.load_gate.shut()
    task = asyncio.create_task(load(http, fake, "sql"))
    await fake.until(lambda: fake.load_gate.waiting == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    fake.load_gate.open()
    await fake.until(lambda: fake.lora_names == ["sql"])


async def test_a_rival_is_first(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    fake.add_rival("sql", "/elsewhere")
    assert await load(http, fake, "sql") == 400
    assert fake.loras == {"sql": "/elsewhere"}


async def test_what_lies_on_the_disk(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    fake.disk["/adapters/none"] = None
    fake.disk["/adapters/big"] = OnDisk(rank=65)
    assert [await load(http, fake, name) for name in ("none", "big", "good")] == [404, 500, 200]
    assert [name for name, _ in fake.loads] == ["none", "big", "good"]


async def test_without_enable_lora_every_load_fails(http: aiohttp.ClientSession) -> None:
    async with FakeVllm(enable_lora=False) as fake:
        assert await load(http, fake, "sql") == 500


async def test_without_runtime_updating_there_is_no_load(http: aiohttp.ClientSession) -> None:
    async with FakeVllm(runtime_updating=False, lora_modules={"sql": "/adapters/sql"}) as fake:
        assert await load(http, fake, "pirate") == 404
        assert fake.lora_names == ["sql"]


async def test_a_restart_forgets_what_was_loaded(http: aiohttp.ClientSession) -> None:
    async with FakeVllm(lora_modules={"static": "/adapters/static"}) as fake:
        await load(http, fake, "sql")
        fake.restart()
        assert fake.lora_names == ["static"]
        async with aiohttp.ClientSession() as fresh:
            assert b"tiny" in await chat(fresh, fake)


async def test_a_stopped_server_refuses_and_comes_back(http: aiohttp.ClientSession) -> None:
    async with FakeVllm() as fake:
        url = fake.url
        await fake.stop()
        with pytest.raises(aiohttp.ClientConnectorError):
            await chat(http, fake)
        await fake.start()
        assert fake.url == url
        assert b"tiny" in await chat(http, fake)


async def test_a_fault_is_for_so_many_requests_to_one_path(
    fake: FakeVllm, http: aiohttp.ClientSession
) -> None:
    fake.inject(Reply(503, {"detail": "busy"}, {"retry-after": "1"}), path=CHAT, times=2)
    async with http.get(f"{fake.url}/health") as response:
        assert response.status == 200
    async with http.post(fake.url + CHAT, json=BODY) as response:
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert await response.json() == {"detail": "busy"}
    assert b"busy" in await chat(http, fake)
    assert b"tiny" in await chat(http, fake)


@pytest.mark.parametrize(
    "fault",
    [
        CLOSE,
        Raw(b"these bytes are no HTTP\r\n\r\n"),
        Raw(b"HTTP/1.1 200 OK\r\ncontent-le"),
        Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"),
    ],
)
async def test_broken_answers(fake: FakeVllm, http: aiohttp.ClientSession, fault: Raw) -> None:
    fake.inject(fault, path=CHAT)
    with pytest.raises(aiohttp.ClientError):
        await chat(http, fake)


async def test_no_answer_at_all(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    fake.inject(HANG)
    task = asyncio.create_task(chat(http, fake))
    await fake.until(lambda: len(fake.requests) == 1)
    await fake.stop()
    with pytest.raises(aiohttp.ClientError):
        await task
    await fake.start()


async def test_a_stream_that_breaks_off(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    fake.inject(Cut(after=2), path=CHAT)
    async with http.post(fake.url + CHAT, json=BODY | {"stream": True}) as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
        assert b'"I"' in await response.content.readuntil(b"\n\n")
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.read()


@pytest.mark.parametrize("stream", [True, False])
async def test_bodies_in_small_pieces(
    fake: FakeVllm,
    http: aiohttp.ClientSession,
    stream: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    whole = await chat(http, fake, stream=stream)
    fake.split = 7
    fake.stream_gate.shut()
    fake.stream_gate.let(1)
    async with http.post(fake.url + CHAT, json=BODY | {"stream": stream}) as response:
        await fake.until(lambda: fake.stream_gate.waiting == 1)
        first = await response.content.readany()
        fake.stream_gate.open()
        rest = await response.content.read()
    assert len(first) == 7
    # the generations' ids are counted, and of one length
    assert (first + rest).replace(b"0002", b"0001") == whole


async def test_a_stream_is_aborted_by_its_client(
    fake: FakeVllm, http: aiohttp.ClientSession
) -> None:
    fake.stream_gate.shut()
    response = await http.post(fake.url + CHAT, json=BODY | {"stream": True})
    await fake.until(lambda: fake.running == 1)
    response.close()
    await fake.until(lambda: (fake.running, fake.aborted) == (0, 1))


@pytest.mark.parametrize("how", ["announced", "silent"])
async def test_it_hangs_up_after_an_answer(
    fake: FakeVllm, http: aiohttp.ClientSession, how: str
) -> None:
    fake.hang_up = how
    reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
    writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = await reader.read()
    assert answer.endswith(b'{"version":"0.32.0"}')
    assert (b"Connection: close" in answer) == (how == "announced")
    writer.close()


async def test_it_closes_at_accept(fake: FakeVllm, http: aiohttp.ClientSession) -> None:
    fake.accepting = False
    with pytest.raises(aiohttp.ClientError):
        await chat(http, fake)
    assert fake.requests == []


async def test_a_raw_server_says_what_it_is_told(http: aiohttp.ClientSession) -> None:
    async def script(peer: RawConnection) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-")
        await peer.send(b"length: 2\r\n\r\nok")
        assert b"again" in await peer.request()
        peer.reset()

    async with RawServer(script) as server:
        async with http.post(server.url, data=b"first") as response:
            assert await response.read() == b"ok"
        with pytest.raises(aiohttp.ClientError):
            await http.post(f"{server.url}/again", data=b"second")
        assert [request.partition(b"\r\n\r\n")[2] for request in server.requests[:2]] == [
            b"first",
            b"second",
        ]


async def test_a_raw_server_stops_in_the_middle_of_its_script() -> None:
    async def script(peer: RawConnection) -> None:
        await peer.until_closed()

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    assert await reader.read() == b""
    writer.close()
