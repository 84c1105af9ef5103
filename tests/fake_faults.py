"""What can be made to go wrong with a fake server, and how a test steers it without sleeping.

Owns the values that name a fault, and the gates that hold requests back; refuses to know the
server that they are used on.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fake_answers import Json


@dataclass(frozen=True, slots=True)
class Reply:
    """Another answer than the right one. A mapping is sent as JSON."""

    status: int
    body: bytes | Json = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Raw:
    """These bytes instead of an answer, then the end of the connection, or silence."""

    data: bytes = b""
    then: Literal["close", "hang"] = "close"


@dataclass(frozen=True, slots=True)
class Cut:
    """The right answer, but the connection closes after so many of its writes."""

    after: int


Fault = Reply | Raw | Cut
HANG = Raw(then="hang")
CLOSE = Raw()


# --- waiting -------------------------------------------------------------------------------


class Signal:
    """Wakes whoever waits for something about the server to become true."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def changed(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, true: Callable[[], bool]) -> None:
        """Returns once `true()` is, without yielding if it is so already."""
        while not true():
            await self._event.wait()


class Gate:
    """A place where requests can be made to wait. Open at first.

    Attributes:
        waiting: How many wait there now.
    """

    def __init__(self, signal: Signal) -> None:
        self._signal = signal
        self._is_open = True
        self._permits = 0
        self.waiting = 0

    def shut(self) -> None:
        self._is_open, self._permits = False, 0

    def open(self) -> None:
        self._is_open = True
        self._signal.changed()

    def let(self, passers: int = 1) -> None:
        """Lets so many through, those who wait or come later; the gate stays shut."""
        self._permits += passers
        self._signal.changed()

    async def passage(self) -> None:
        self.waiting += 1
        self._signal.changed()
        try:
            await self._signal.until(lambda: self._is_open or self._permits > 0)
        finally:
            self.waiting -= 1
        if not self._is_open:
            self._permits -= 1
