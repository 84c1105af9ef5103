"""`lora-proxy serve` as a process: how it starts, listens, and ends."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest
from fake_vllm import HANG, FakeVllm, Reply
from proxied import CHAT, PATIENCE, Start, chat, until

from lora_proxy.app import EXIT_CONFIG, EXIT_LISTEN, EXIT_OK


@dataclass(slots=True)
class Running:
    """A proxy in a process of its own.

    Attributes:
        process: The process.
        log: What it has written to stderr.
    """

    process: asyncio.subprocess.Process
    log: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.log)

    @property
    def url(self) -> str:
        found = re.search(r"listening on (\S+)", self.text)
        return found[1] if found else ""

    async def listening(self) -> None:
        await until(lambda: self.url or self.process.returncode is not None)
        assert self.url, self.text

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()


@asynccontextmanager
async def serving(
    *upstreams: str, listen: str = "127.0.0.1:0", adapter: str = "sql", **environ: str
) -> AsyncIterator[Running]:
    """Runs `lora-proxy serve`; tracebacks and warnings count as faults."""
    flags = [part for url in upstreams for part in ("--upstream", url)]
    flags += ["--listen", listen, "--adapter", f"{adapter}=/adapters/sql"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "always", "-m", "lora_proxy", "serve", *flags),
        stderr=asyncio.subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if not k.startswith("LORA_PROXY_")} | environ,
    )
    running = Running(process)
    reading = asyncio.create_task(_read(running))
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading
    assert "Traceback" not in running.text
    assert "Warning" not in running.text


async def _read(running: Running) -> None:
    assert running.process.stderr is not None
    while line := await running.process.stderr.readline():
        running.log.append(line.decode())


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:
        yield session


async def refuses(url: str) -> bool:
    """Whether nobody listens there."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    writer.close()
    await writer.wait_closed()
    return False


async def eventually(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await true():  # noqa: ASYNC110  # another process's doing has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "stream"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
async def test_a_signal_ends_it_after_the_requests_under_way(
    fake: FakeVllm, session: aiohttp.ClientSession, number: int, *, stream: bool
) -> None:
    async with serving(fake.url) as running:
        await running.listening()
        gate = fake.stream_gate if stream else fake.answer_gate
        gate.shut()
        body = chat("sql", stream=stream)
        asking = asyncio.create_task(session.post(running.url + CHAT, json=body))
        await fake.until(lambda: gate.waiting == 1)
        running.process.send_signal(number)
        await eventually(lambda: refuses(running.url))
        assert running.process.returncode is None
        gate.open()
        async with await asking as response:
            assert response.status == 200
            assert b'"model":"sql"' in await response.read()
        assert await running.ended() == EXIT_OK


async def test_after_sigterm_it_says_that_it_is_leaving_and_still_serves(
    fake: FakeVllm, session: aiohttp.ClientSession
) -> None:
    async with serving(fake.url, LORA_PROXY_TIMEOUTS__NOTICE="3600") as running:
        await running.listening()

        async def leaving() -> bool:
            async with session.get(running.url + "/ready") as response:
                return response.headers.get("x-lora-proxy-error") == "draining"

        assert not await leaving()
        running.process.send_signal(signal.SIGTERM)
        await eventually(leaving)
        async with session.post(running.url + CHAT, json=chat("sql")) as response:
            assert response.status == 200
            assert response.headers["connection"] == "close"
        async with session.get(running.url + "/health") as response:
            assert response.status == 200
        running.process.send_signal(signal.SIGTERM)  # who says it twice is in a hurry
        assert await running.ended() == EXIT_OK


async def test_requests_that_do_not_end_are_cut_off_after_the_drain_time(
    fake: FakeVllm, session: aiohttp.ClientSession
) -> None:
    async with serving(fake.url, LORA_PROXY_TIMEOUTS__DRAIN="0.2") as running:
        await running.listening()
        fake.answer_gate.shut()
        asking = asyncio.create_task(session.post(running.url + CHAT, json=chat("sql")))
        await fake.until(lambda: fake.running == 1)
        running.process.terminate()
        assert await running.ended() == EXIT_OK
        with pytest.raises(aiohttp.ClientError):
            await asking
        await fake.until(lambda: fake.aborted == 1)
        fake.answer_gate.open()


async def test_an_idle_connection_holds_up_neither_the_end_nor_the_next_start(
    fake: FakeVllm, session: aiohttp.ClientSession
) -> None:
    listen = "127.0.0.1:0"
    for _ in range(2):
        async with serving(fake.url, listen=listen) as running:
            await running.listening()
            listen = running.url.removeprefix("http://")
            async with session.get(running.url + "/health") as response:
                assert response.status == 200
            running.process.terminate()  # the client has kept its connection
            assert await running.ended() == EXIT_OK


async def test_a_signal_during_the_start_ends_it(fake: FakeVllm) -> None:
    fake.inject(HANG, path="/health")
    async with serving(fake.url) as running:
        await fake.until(lambda: bool(fake.requests))
        running.process.terminate()
        assert await running.ended() == EXIT_OK
        assert running.url == ""


async def test_a_port_in_use_is_one_clear_line(fake: FakeVllm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        async with serving(fake.url, listen=listen) as running:
            assert await running.ended() == EXIT_LISTEN
        errors = [line for line in running.log if line.startswith("error: ")]
        assert len(errors) == 1
        assert f"cannot listen on {listen}" in errors[0]
        assert "in use" in errors[0]


async def test_names_that_a_running_upstream_has_already_are_refused() -> None:
    async with FakeVllm(base="sql") as one, FakeVllm(base="gpt-3.5-turbo") as two:
        adapters = '[{"name": "sql", "path": "/a"}, {"name": "b", "path": "/b", "aliases": '
        environ = {"LORA_PROXY_ADAPTERS": adapters + '["gpt-3.5-turbo"]}]'}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lora_proxy", "serve", "--listen", "127.0.0.1:0"),
            *("--upstream", one.url, "--upstream", two.url),
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | environ,
        )
        _, stderr = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == EXIT_CONFIG, stderr.decode()
        errors = [line for line in stderr.decode().splitlines() if line.startswith("error: ")]
        assert len(errors) == 2
        assert "adapter 'sql'" in errors[0]
        assert "rename" in errors[0]
        assert "alias" in errors[1]
        assert "Traceback" not in stderr.decode()


async def test_an_upstream_that_is_down_does_not_keep_it_from_starting(
    fake: FakeVllm, session: aiohttp.ClientSession
) -> None:
    await fake.stop()
    async with serving(fake.url, LORA_PROXY_PROBE_INTERVAL="0.05") as running:
        await running.listening()

        async def ready() -> bool:
            async with session.get(running.url + "/ready") as response:
                assert response.status in (200, 503)
                return response.status == 200

        assert not await ready()
        await fake.start()
        await eventually(ready)
        async with session.post(running.url + CHAT, json=chat("sql")) as response:
            assert response.status == 200


async def test_it_listens_on_ipv6(fake: FakeVllm, session: aiohttp.ClientSession) -> None:
    async with serving(fake.url, listen="[::1]:0") as running:
        await running.listening()
        assert running.url.startswith("http://[::1]:")
        async with session.post(running.url + CHAT, json=chat("tiny")) as response:
            assert response.status == 200


async def test_the_upstreams_key_comes_from_the_environment_and_is_not_logged(
    fake: FakeVllm, session: aiohttp.ClientSession
) -> None:
    fake.inject(Reply(500, {"error": "key SECRET-1 is tired"}), path="/v1/load_lora_adapter")
    async with serving(
        fake.url, LORA_PROXY_UPSTREAMS__0__API_KEY="SECRET-1", LORA_PROXY_LOG_LEVEL="debug"
    ) as running:
        await running.listening()
        for model in ("tiny", "sql"):
            async with session.post(running.url + CHAT, json=chat(model)) as response:
                assert b"SECRET" not in await response.read()
        assert {seen.headers.get("authorization") for seen in fake.requests} == {"Bearer SECRET-1"}
        assert "SECRET" not in running.text


async def test_stopping_twice_is_no_matter(fake: FakeVllm, proxied: Start) -> None:
    async with proxied(fake) as p:
        await p.ask("sql")
        await p.app.stop()  # and once more when the test ends
