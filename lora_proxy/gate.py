"""Where requests wait for a place on an upstream that is at its limit.

Carries out what `admission` decides: who may go, who waits, whose turn is next. Knows
nothing of why a request wants which upstream.
"""

import asyncio
from collections.abc import Iterable, Sequence
from itertools import count

from lora_proxy.admission import Admission, Admit
from lora_proxy.errors import ProxyError
from lora_proxy.metrics import Metrics

RETRY_AFTER = 5.0  # seconds; what a client is told that did not get a place


class Gate:
    """Places on all upstreams.

    Args:
        length: Requests that may wait.
        timeout: Seconds that one waits.
        metrics: Where waits are observed.
    """

    def __init__(self, length: int, timeout: float, metrics: Metrics) -> None:
        self._admission = Admission(length)
        self._timeout = timeout
        self._metrics = metrics
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._tickets = count(1)

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return self._admission.depth

    def limit(self, upstream: str, most: int | None) -> None:
        """Sets how many requests an upstream gets at once; None is no bound."""
        self._let_in(self._admission.limit(upstream, most))

    def remove(self, upstream: str) -> None:
        """The upstream has left: who waits for it alone has waited in vain."""
        for ticket in self._admission.remove(upstream):
            gone = ProxyError("no_upstream", "the upstream that was waited for has left the fleet")
            self._settle(ticket, gone)

    async def enter(self, label: str, upstreams: Sequence[str]) -> str:
        """Takes a place on the first upstream that has room, or waits for one.

        Args:
            label: Whose turn it is counted as: the adapter's name.
            upstreams: Any of these will do; the best first, at least one.

        Returns:
            Where the place is, to be given back by `leave`.

        Raises:
            ProxyError: `queue_full`, `queue_timeout`; `no_upstream` if all have left.
        """
        for upstream in upstreams:
            if self._admission.enter(upstream):
                return upstream
        ticket = next(self._tickets)
        if not self._admission.wait(ticket, label, upstreams):
            raise ProxyError(
                "queue_full",
                "every upstream is busy, and too many requests wait already; try again later",
                retry_after=RETRY_AFTER,
            )
        return await self._wait(ticket, label)

    def leave(self, upstream: str) -> None:
        """Gives a place back."""
        self._let_in(self._admission.leave(upstream))

    async def _wait(self, ticket: int, label: str) -> str:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        self._waiting[ticket] = future
        started = loop.time()
        try:
            async with asyncio.timeout(self._timeout):
                upstream = await future
        except BaseException as error:
            # Perhaps just as the answer came: then nobody else will look at it.
            if future.done() and not future.cancelled():
                future.exception()
            self._let_in(self._admission.withdraw(ticket))
            if isinstance(error, TimeoutError):
                raise ProxyError(
                    "queue_timeout",
                    f"no upstream was free within {self._timeout:g} s; try again",
                    retry_after=RETRY_AFTER,
                ) from None
            raise
        else:
            self._admission.taken(ticket)
            return upstream
        finally:
            del self._waiting[ticket]
            self._metrics.queue_wait(label).observe(loop.time() - started)

    def _let_in(self, admits: Iterable[Admit]) -> None:
        for admit in admits:
            self._settle(admit.ticket, admit.upstream)

    def _settle(self, ticket: object, outcome: str | ProxyError) -> None:
        future = self._waiting.get(ticket) if isinstance(ticket, int) else None
        if future is None or future.done():
            return  # it gave up in this very turn of the loop, and withdraws by itself
        if isinstance(outcome, ProxyError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
