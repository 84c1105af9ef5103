"""Whether one upstream may be used now: the probes' verdict, a circuit breaker, slow start.

Owns the thresholds and the passage between the states. Refuses to know how a probe or a
request is made: facts come in with the time, and the state is asked with the time.

Three witnesses speak, and each can take an upstream out on its own:

    probes     up ──`fall` failures in a row──▶ down ──`rise` successes in a row──▶ up
    traffic    closed ──`fall` failures in a row──▶ open ──`pause` over──▶ half-open
               half-open ──`trials` successes in a row──▶ closed
               half-open ──a failure──▶ open, twice as long
    itself     "not before …" (a 429 or 503 with Retry-After) ──that time──▶ as before

Probes alone would not do: a server whose health path answers while every request fails
would never be left alone. Traffic alone would not do: nobody would find out that a server
which gets no requests is back. A refused connection speaks for both.

Probes that bring an upstream back speak of a new process, more likely than not: what traffic
said of the old one is doubtful then, and an open circuit becomes half-open at once.

An upstream that returns, by probes or by trials, starts slowly: for `ramp` seconds its share
grows from a tenth to the whole, so that a cold cache does not meet the whole load at once.
"""

from dataclasses import dataclass
from enum import Enum

LEAST_SHARE = 0.1
"""The part of its weight that a returning upstream starts with."""

HOLD_MOST = 60.0
"""Seconds for which an upstream can ask to be left alone; it can ask again."""

SOONEST, LATEST = 0.25, 8.0
"""The next probe of an upstream that fails, in intervals: after one failure, after many."""


class Circuit(Enum):
    """What traffic says of an upstream."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What it takes to change a verdict.

    Attributes:
        fall: Failures in a row that take an upstream out, of probes or of requests; at
            least 1.
        rise: Successful probes in a row that bring it back; at least 1.
        pause: Seconds that an open circuit stays open the first time; doubles with every
            failed trial, up to `pause_most`.
        pause_most: Seconds.
        trials: Requests that a half-open circuit lets through at once, and successes in a
            row that close it; at least 1.
        ramp: Seconds of slow start; 0 for none.
    """

    fall: int = 3
    rise: int = 1
    pause: float = 5.0
    pause_most: float = 60.0
    trials: int = 2
    ramp: float = 10.0


class Health:
    """One upstream's verdicts.

    Every `begin` is answered by one `succeeded`, `failed` or `cancelled`, which is handed
    what `begin` returned. The earlier the better: an answer's head proves enough, and a trial
    that lasts as long as its stream keeps the others waiting. What breaks after its head is
    one more `failed`, with `trial=False`.

    Args:
        thresholds: When the verdicts change.
        up: What probes are taken to have said before the first one.

    Attributes:
        thresholds: As given.
        up: The probes' verdict.
        circuit: Traffic's, as of the last call.
    """

    __slots__ = (
        "_answered",
        "_failed",
        "_held_until",
        "_open_until",
        "_pause",
        "_returned",
        "_silent",
        "_succeeded",
        "_trials",
        "circuit",
        "thresholds",
        "up",
    )

    def __init__(self, thresholds: Thresholds, *, up: bool) -> None:
        self.thresholds = thresholds
        self.up = up
        self.circuit = Circuit.CLOSED
        self._answered = 0  # successful probes in a row
        self._silent = 0  # failed probes in a row
        self._failed = 0  # failed requests in a row, while closed
        self._succeeded = 0  # successful trials in a row, while half-open
        self._trials = 0  # trials under way, of this half-open period or an earlier one
        self._pause = thresholds.pause
        self._open_until = 0.0
        self._held_until = 0.0
        self._returned: float | None = None  # when it last came back

    # --- probes ------------------------------------------------------------------------

    def probe_ok(self, now: float) -> bool:
        """A probe succeeded.

        Returns:
            Whether the upstream came up by it.
        """
        self._silent = 0
        self._answered += 1
        if self.up or self._answered < self.thresholds.rise:
            return False
        self.up, self._returned, self._held_until = True, now, 0.0
        self._failed, self._pause = 0, self.thresholds.pause
        if self.circuit is Circuit.OPEN:
            self._half_open()
        return True

    def probe_failed(self) -> bool:
        """A probe failed.

        Returns:
            Whether the upstream went down by it.
        """
        self._answered = 0
        self._silent += 1
        if not self.up or self._silent < self.thresholds.fall:
            return False
        self.up = False
        return True

    def next_probe(self, interval: float, jitter: float) -> float:
        """Seconds until the next probe.

        A first failure, and a first success of what was down, are looked into soon. What
        goes on failing is asked less and less often.

        Args:
            interval: Seconds between two probes while all is well.
            jitter: What the answer is multiplied with, so that many proxies do not probe
                in step.
        """
        if self._silent:
            # The exponent has a bound, as a float has.
            times = min(LATEST, SOONEST * 2.0 ** min(self._silent - 1, 16))
        else:
            times = 1.0 if self.up else SOONEST
        return interval * times * jitter

    # --- traffic -----------------------------------------------------------------------

    def usable(self, now: float) -> bool:
        """Whether a request may be sent; an open circuit whose pause is over is half-open now."""
        if self.circuit is Circuit.OPEN and now >= self._open_until:
            self._half_open()
        return self.up and now >= self._held_until and self._lets_through

    def begin(self) -> bool:
        """A request is on its way. `usable` has just said that it may be.

        Returns:
            Whether it is a trial.
        """
        trial = self.circuit is Circuit.HALF_OPEN and self._lets_through
        self._trials += trial
        return trial

    def succeeded(self, now: float, *, trial: bool) -> None:
        """The upstream answered, or failed by the client's fault."""
        self._trials -= trial
        self._failed = 0
        if not trial or self.circuit is not Circuit.HALF_OPEN:
            return  # sent before the circuit opened, or the verdict is there already
        self._succeeded += 1
        if self._succeeded >= self.thresholds.trials:
            self.circuit, self._returned = Circuit.CLOSED, now
            self._pause = self.thresholds.pause

    def failed(self, now: float, jitter: float = 1.0, *, trial: bool) -> bool:
        """A request failed by the upstream's fault.

        Args:
            now: Seconds.
            jitter: What the pause is multiplied with, so that many proxies do not try again
                at one moment.
            trial: What `begin` returned.

        Returns:
            Whether the circuit opened by it.
        """
        self._trials -= trial
        if self.circuit is Circuit.OPEN or (self.circuit is Circuit.HALF_OPEN and not trial):
            return False  # sent before the circuit opened
        if trial and self.circuit is Circuit.HALF_OPEN:
            self._pause = min(2 * self._pause, self.thresholds.pause_most)
        else:
            self._failed += 1
            if self._failed < self.thresholds.fall:
                return False
        self.circuit, self._failed = Circuit.OPEN, 0
        self._open_until = now + self._pause * jitter
        return True

    def cancelled(self, *, trial: bool) -> None:
        """A request ended without a word about the upstream: its client left."""
        self._trials -= trial

    def unavailable_until(self, now: float, seconds: float) -> None:
        """The upstream asked to be left alone for so long. No failure, and no circuit opens.

        Args:
            now: Seconds.
            seconds: From its Retry-After; more than `HOLD_MOST` count as that. An earlier,
                longer wish stands.
        """
        self._held_until = max(self._held_until, now + min(seconds, HOLD_MOST))

    # --- readings ----------------------------------------------------------------------

    def share(self, now: float) -> float:
        """The part of its weight that it should get now, from `LEAST_SHARE` to 1."""
        ramp = self.thresholds.ramp
        if self._returned is None or now >= self._returned + ramp:
            return 1.0
        return LEAST_SHARE + (1 - LEAST_SHARE) * (now - self._returned) / ramp

    def wait(self, now: float) -> float | None:
        """Seconds until a request may be sent; None where only a probe can tell.

        Zero, too, where the end of a trial is all that is waited for.
        """
        if not self.up:
            return None
        opens = self._open_until if self.circuit is Circuit.OPEN else 0.0
        return max(opens - now, self._held_until - now, 0.0)

    @property
    def _lets_through(self) -> bool:
        """Whether the circuit has a place for a request."""
        if self.circuit is Circuit.HALF_OPEN:
            return self._trials < self.thresholds.trials
        return self.circuit is Circuit.CLOSED

    def _half_open(self) -> None:
        self.circuit, self._succeeded = Circuit.HALF_OPEN, 0
