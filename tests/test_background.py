"""What runs besides requests: nothing is lost, nothing outlives its owner."""

import asyncio
import logging
import threading

import pytest

from lora_proxy.background import Files, Tasks


async def test_a_task_gives_its_result_and_leaves() -> None:
    tasks = Tasks()

    async def work() -> int:
        return 7

    task = tasks.spawn(work())
    assert len(tasks) == 1
    assert await task == 7
    assert len(tasks) == 0


async def test_close_cancels_and_waits_until_all_have_ended() -> None:
    tasks, ended = Tasks(), []

    async def work(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # an end that takes a while
            ended.append(number)

    for number in range(3):
        tasks.spawn(work(number))
    await asyncio.sleep(0)
    await tasks.close()
    assert sorted(ended) == [0, 1, 2]
    assert len(tasks) == 0


async def test_close_also_ends_what_a_cancelled_task_has_started() -> None:
    tasks, ended = Tasks(), []

    async def second() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("second")

    async def first() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            tasks.spawn(second())

    tasks.spawn(first())
    await asyncio.sleep(0)
    await tasks.close()
    assert len(tasks) == 0
    assert ended in ([], ["second"])  # never begun, or ended
    assert len(asyncio.all_tasks()) == 1


async def test_a_failure_is_logged_also_if_nobody_awaits_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = Tasks()

    async def work() -> None:
        raise ValueError("broken")

    task = tasks.spawn(work())
    await asyncio.wait([task])
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "broken"
    assert len(tasks) == 0


async def test_a_failure_reaches_whoever_awaits_it() -> None:
    tasks = Tasks()

    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await tasks.spawn(work())


async def test_files_returns_and_raises_what_the_function_does() -> None:
    files = Files()
    assert await files.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await files.call(divmod, 1, 0)
    files.close()


async def test_a_hung_look_blocks_neither_the_loop_nor_other_looks_nor_the_end() -> None:
    files, mount = Files(threads=2), threading.Event()
    hung = asyncio.ensure_future(files.call(mount.wait))
    assert await files.call(threading.current_thread) is not threading.main_thread()
    hung.cancel()
    await asyncio.wait([hung])
    assert hung.cancelled()
    files.close()  # does not wait
    mount.set()
