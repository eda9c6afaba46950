"""Ask a judge for all comparisons: threads that ask an endpoint, wait and try again, and write each judgement down.

    lost requests (no connection, a status of 429 or 5xx, a stalled, huge or damaged reply)    again, after a pause
    replies without a judgement                                                                again, with a reminder
    a status such as 400                                                                       a failure of this comparison
    401, 403 or 404 before the first reply; `_DEAD` comparisons without any reply in a row     the run stops

The pause is what the endpoint asks for (Retry-After; then no thread starts a request before), or else doubles from one
second to a minute, with a random factor from ½ to 1 so that the threads do not return together. A comparison ends with a
judgement, or with -1 and its reason: after `attempts` replies without a judgement, it is final ("unread"); if requests were
lost, the next run asks it again ("endpoint").
"""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from qlora_jax.errors import QLoRAError
from qlora_jax.evaluate.judge.answers import Comparison
from qlora_jax.evaluate.judge.endpoint import Endpoint, EndpointFailure, Reply
from qlora_jax.evaluate.judge.journal import FAILED, UNREAD, Journal, no_judgement, request_hash
from qlora_jax.evaluate.judge.limits import LimitReached, Meter, Spent
from qlora_jax.evaluate.judge.prompts import judge_messages, read_reply, reminder
from qlora_jax.evaluate.judgements import Kind

__all__ = ["EndpointError", "Judging", "Patience", "Tally", "ask_all"]

_DEAD = 10
_REFUSED = (401, 403, 404)
_LONGEST_REPLY = 4000  # characters of a reply that a row keeps


class EndpointError(QLoRAError):
    """The endpoint of a judge refuses to work or does not answer at all."""


@dataclass(frozen=True)
class Patience:
    """How long a judge is tried.

    Attributes:
        attempts: the most requests for a comparison.
        concurrency: the most requests under way at a time.
        first_pause, longest_pause: the seconds before the second request, and the most that any pause doubles to.
        longest_wait: the most seconds that a Retry-After may ask for; more is a failure of the comparison.
    """

    attempts: int = 7
    concurrency: int = 8
    first_pause: float = 1.0
    longest_pause: float = 60.0
    longest_wait: float = 300.0


@dataclass
class Tally:
    """How many comparisons ended in each way, by this run."""

    judged: int = 0
    unread: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None


@dataclass(frozen=True)
class Judging:
    """Who is asked for what, with which patience and within which limits; and what is called after each comparison."""

    endpoint: Endpoint
    kind: Kind
    patience: Patience
    meter: Meter
    done: Callable[[Tally], None] = lambda _: None

    def request(self, comparison: Comparison) -> str:
        """Return the hash of what is asked for a comparison, the judge included."""
        endpoint = self.endpoint
        asked = {"model": endpoint.model, "messages": judge_messages(comparison, self.kind), "kind": self.kind}
        return request_hash(asked | {"max_tokens": endpoint.max_tokens, "temperature": endpoint.temperature})


class _Lost(Exception):
    """A comparison that the endpoint gave no reply to."""


def ask_all(judging: Judging, comparisons: Sequence[Comparison], journal: Journal) -> Tally:
    """Ask for all comparisons and return how they ended. Every judgement is in the journal when it is counted.

    A limit stops the run without an error, with its reason in `Tally.stopped`; the rest is not asked then.

    Raises:
        EndpointError: the endpoint refuses the key or the model, or does not answer. The judgements so far are written.
    """
    run = _Run(judging, journal)
    with ThreadPoolExecutor(judging.patience.concurrency) as threads:
        futures = [threads.submit(run.settle, comparison) for comparison in comparisons]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            run.stop.set()
            threads.shutdown(cancel_futures=True)
        _raise_first(futures)
    run.write_failures()
    return run.tally


def _raise_first(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error


class _Run:
    """What the threads of a run share."""

    def __init__(self, judging: Judging, journal: Journal) -> None:
        self.judging, self.journal, self.tally, self.stop = judging, journal, Tally(), judging.meter.stopped
        self._lock = threading.Lock()
        self._replied, self._lost_in_a_row = False, 0
        self._failures: list[tuple[Comparison, dict[str, Any]]] = []

    def settle(self, comparison: Comparison) -> None:
        """Ask for one comparison until it has an end, and write it down."""
        if self.stop.is_set():
            return
        kind, endpoint = self.judging.kind, self.judging.endpoint
        columns: dict[str, Any] = {"judge": endpoint.model, "request": self.judging.request(comparison)}
        spent = Spent(0, 0)
        try:
            found, reply = self._judgement(comparison, spent)
        except LimitReached as reached:
            with self._lock:
                self.tally.stopped = self.tally.stopped or str(reached)
            self.stop.set()
            return
        except _Lost as lost:
            if self.stop.is_set():
                return
            columns |= {"failure": FAILED, "reason": str(lost), "tokens": [spent.read, spent.written]}
            self._count("failed", str(lost))
            with self._lock:
                self._failures.append((comparison, {**no_judgement(kind), **columns}))
                self._lost_in_a_row += 1
                dead = self._lost_in_a_row >= _DEAD
            if dead:
                raise EndpointError(
                    f"endpoint {endpoint.url}: expected replies, found none for {_DEAD} comparisons in a row, "
                    f"the last time: "
                    f"{lost}; what was judged is saved"
                ) from None
            return
        columns |= {"reply": reply[:_LONGEST_REPLY], "tokens": [spent.read, spent.written]}
        if found is None:
            self.journal.add(comparison, {**no_judgement(kind), **columns, "failure": UNREAD})
            self._count("unread", "no judgement could be read from the replies")
        else:
            self.journal.add(comparison, {**found, **columns})
            self._count("judged")

    def write_failures(self) -> None:
        """Write the comparisons that the endpoint failed, at the end of the file."""
        for comparison, columns in self._failures:
            self.journal.add(comparison, columns)

    def _judgement(self, comparison: Comparison, spent: Spent) -> tuple[dict[str, Any] | None, str]:
        """Return the columns of the judgement, None if no reply had one, and the last reply; add to what was spent."""
        patience, kind = self.judging.patience, self.judging.kind
        messages, last, pause, reason = judge_messages(comparison, kind), None, patience.first_pause, ""
        for attempt in range(patience.attempts):
            if self.stop.is_set():
                raise _Lost("the run stopped")
            try:
                reply = self._ask(messages if last is None else [*messages, reminder(kind)], spent)
            except EndpointFailure as failure:
                reason = str(failure)
                if failure.status in _REFUSED and not self._replied:
                    raise EndpointError(f"endpoint {self.judging.endpoint.url}: {failure}") from None
                if not failure.again:
                    raise _Lost(reason) from None
                if failure.wait is not None and failure.wait > patience.longest_wait:
                    raise _Lost(f"{reason} (it asks to wait {failure.wait:,.0f} s)") from None
                if failure.status == 429:
                    self.judging.meter.slow_down()
                if failure.wait is not None:
                    self.judging.meter.pause(failure.wait)
                elif attempt + 1 < patience.attempts:
                    self.stop.wait(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, patience.longest_pause)
                continue
            self._replied, self._lost_in_a_row = True, 0
            self.judging.meter.speed_up()
            last = reply.text
            if (found := read_reply(last, kind)) is not None:
                return found, last
        if last is None:
            raise _Lost(reason)
        return None, last

    def _ask(self, messages: list[dict[str, Any]], spent: Spent) -> Reply:
        endpoint = self.judging.endpoint
        with self.judging.meter.request(len(endpoint.body(messages)), endpoint.max_tokens) as used:
            try:
                if self.stop.is_set():
                    raise EndpointFailure("the run stopped")
                reply = endpoint.ask(messages)
                if reply.tokens is not None:
                    used.read, used.written = reply.tokens
            except EndpointFailure as failure:
                if not failure.perhaps_charged:
                    used.read = used.written = 0
                raise
            finally:
                spent.read += used.read
                spent.written += used.written
        return reply

    def _count(self, name: str, reason: str | None = None) -> None:
        with self._lock:
            setattr(self.tally, name, getattr(self.tally, name) + 1)
            if reason:
                self.tally.reasons[reason] = self.tally.reasons.get(reason, 0) + 1
            self.judging.done(self.tally)
