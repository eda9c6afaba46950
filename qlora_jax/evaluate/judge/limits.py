"""Limits of what a judge may be asked: requests a minute, tokens, and cost; and the pauses that its endpoint asks for.

Tokens are known only after a reply. A request therefore reserves the most that it can use: a token for each byte of its
text, since no tokenizer in use makes more of it, and the longest reply. It waits while the reservations of requests under
way leave no room for its own, and the limit is reached when it has no room although none is under way. After the reply, the
reservation is replaced by the tokens that the endpoint counted. Requests whose reply was lost stay counted with what they
had reserved.

An endpoint that limits the rate (status 429) doubles the time between the starts of two requests, once for all requests
that were under way together; each reply shortens it by 30 %. Threads that wait for the same pause to end would otherwise be
refused together, again and again.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["LimitReached", "Limits", "Meter", "Spent"]

_FIRST_GAP, _LONGEST_GAP = 0.1, 10.0  # seconds


class LimitReached(Exception):
    """A limit leaves no room for a further request."""


@dataclass(frozen=True)
class Limits:
    """The limits.

    Attributes:
        requests_per_minute: None: no limit.
        tokens: of prompts and replies together; None: no limit.
        cost: in the unit of the prices; None: no limit.
        prices: of a million tokens of prompts, and of a million tokens of replies.
    """

    requests_per_minute: float | None = None
    tokens: int | None = None
    cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)

    def cost_of(self, read: int, written: int) -> float:
        """Return the cost of tokens of prompts and of replies."""
        return (read * self.prices[0] + written * self.prices[1]) / 1e6


@dataclass(eq=False)
class Spent:
    """The tokens of one request: what it reserves, and then what it used."""

    read: int
    written: int


class Meter:
    """What was spent so far; shared by the threads that ask.

    Attributes:
        read, written: tokens of prompts and of replies.
        stopped: set when the run ends early; nothing waits any longer then.
    """

    def __init__(self, limits: Limits, read: int = 0, written: int = 0) -> None:
        self.limits, self.read, self.written = limits, read, written
        self.stopped = threading.Event()
        self._changed = threading.Condition()
        self._reserved: list[Spent] = []
        self._next_start = self._paused_until = time.monotonic()
        self._least_gap = 60 / limits.requests_per_minute if limits.requests_per_minute else 0.0
        self._gap, self._slowed = 0.0, -math.inf

    @property
    def cost(self) -> float:
        """The cost of what was spent."""
        return self.limits.cost_of(self.read, self.written)

    @contextmanager
    def request(self, read: int, written: int) -> Iterator[Spent]:
        """Wait until a request may start, and count it afterwards.

        Yields the reservation, which the caller changes to what was used. If the block raises, the reservation as it is then
        counts as well.

        Args:
            read, written: the most tokens that the request can use.

        Raises:
            LimitReached: there is no room for the request.
        """
        spent = Spent(read, written)
        with self._changed:
            while not self._fits(spent):
                if not self._reserved:
                    raise LimitReached(self._reached())
                self._changed.wait()
            self._reserved.append(spent)
        try:
            self._wait_for_turn()
            yield spent
        finally:
            with self._changed:
                self._reserved.remove(spent)
                self.read += spent.read
                self.written += spent.written
                self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Start no request before so many seconds have passed."""
        with self._changed:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def slow_down(self) -> None:
        """Double the time between two requests, because there were too many."""
        with self._changed:
            now = time.monotonic()
            if now >= self._slowed + self._gap:
                self._gap, self._slowed = min(max(2 * self._gap, _FIRST_GAP), _LONGEST_GAP), now

    def speed_up(self) -> None:
        """Shorten the time between two requests, because one had a reply."""
        with self._changed:
            self._gap = 0.7 * self._gap if self._gap > _FIRST_GAP / 10 else 0.0

    def _wait_for_turn(self) -> None:
        """Wait until the endpoint's pauses are over and the last request started long enough ago."""
        while not self.stopped.is_set():
            with self._changed:
                now = time.monotonic()
                start = max(self._next_start, self._paused_until)
                if start <= now:
                    self._next_start = now + max(self._least_gap, self._gap)
                    return
            self.stopped.wait(start - now)

    def _fits(self, spent: Spent) -> bool:
        read = self.read + spent.read + sum(one.read for one in self._reserved)
        written = self.written + spent.written + sum(one.written for one in self._reserved)
        tokens, cost = self.limits.tokens, self.limits.cost
        return (tokens is None or read + written <= tokens) and (cost is None or self.limits.cost_of(read, written) <= cost)

    def _reached(self) -> str:
        parts = []
        if self.limits.tokens is not None:
            parts.append(f"{self.read + self.written:,} of {self.limits.tokens:,} tokens")
        if self.limits.cost is not None:
            parts.append(f"a cost of {self.cost:.4f} of {self.limits.cost:g}")
        return f"used: {', '.join(parts)}, which leaves no room for the next request"
