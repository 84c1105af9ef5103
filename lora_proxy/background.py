"""Owners for what runs besides requests: tasks, and threads for blocking file access.

Knows nothing of what they do. Whatever is started here is ended here.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class Tasks:
    """Background tasks with an owner: none is lost, all are cancelled at the end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, coroutine: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Runs it until it ends or `close` cancels it.

        An exception is logged, and raised for whoever awaits the task.
        """
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancels all and waits until they have ended, also those that their end started."""
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)


class Files:
    """Blocking looks at files, in threads of their own.

    A hung network mount blocks these threads and nothing else: not the event loop, and
    not the default threads, which resolve host names.
    """

    def __init__(self, threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapter-files")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a thread and returns, or raises, what it does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Takes no more calls; does not wait for one that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)
