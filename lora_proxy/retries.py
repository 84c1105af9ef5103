"""How many retries there may be, and how long an upstream asks to be left alone.

Owns the budget and the reading of Retry-After. Refuses to know which failures may be
retried, and where.
"""

import re
from calendar import timegm
from email.utils import parsedate_tz

MOST = 60.0
"""Seconds; whoever asks for more is asked again after these."""

_SECONDS = re.compile(rb"\d+\Z")


class Budget:
    """Lets retries be a share of traffic, however much of it fails.

    Every first try earns a part of a retry, which is kept, up to what `burst` of them earn:
    enough for all that was under way on an upstream that dies. So when all upstreams fail,
    retries add `share` to the load and not a multiple of it, while a few failures after a
    quiet time are all retried. There is no clock in it: what could be retried too often is
    in proportion to what was tried at all.

    Args:
        share: Retries that a first try earns; 0 for no retries at all.
        reserve: Retries that are there at the start, and may always be kept; at least 1.
        burst: First tries whose earned retries may be kept.

    Raises:
        ValueError: If `share` is below 0, or `reserve` below 1.
    """

    __slots__ = ("_most", "_share", "_tokens")

    def __init__(self, share: float = 0.2, reserve: float = 10.0, burst: int = 1000) -> None:
        if share < 0 or reserve < 1:
            raise ValueError(f"no budget has a share of {share} and a reserve of {reserve}")
        self._share = share
        self._most = max(reserve, share * burst)
        self._tokens = reserve if share else 0.0

    def deposit(self) -> None:
        """A request is tried for the first time."""
        self._tokens = min(self._tokens + self._share, self._most)

    def spend(self) -> bool:
        """Whether one more retry may be made; if so, it is counted."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def retry_after(value: bytes | None, date: bytes | None = None) -> float | None:
    """Seconds that an answer asks to wait, from 0 to `MOST`; None where it does not say.

    Args:
        value: Its Retry-After field: seconds, or a date (RFC 9110, 10.2.3).
        date: Its Date field. A date is only worth its distance from this one: the two clocks
            are the same, and ours may be another.
    """
    if value is None:
        return None
    value = value.strip(b" \t")
    if _SECONDS.match(value):
        # Cut off, for Python refuses to read thousands of digits; what is left is above MOST.
        return min(float(value.lstrip(b"0")[:9] or b"0"), MOST)
    until, now = _timestamp(value), _timestamp(date or b"")
    if until is None or now is None:
        return None
    return float(min(max(until - now, 0), MOST))


def _timestamp(date: bytes) -> int | None:
    """Seconds since 1970 of a date in any form that HTTP has had."""
    try:
        fields = parsedate_tz(date.decode("ascii"))
        # HTTP's dates are in GMT, said or not.
        return None if fields is None else timegm(fields[:9]) - (fields[9] or 0)
    except (ValueError, OverflowError):
        return None
