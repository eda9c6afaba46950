"""Which answers run in the rows of the engine, and in which order: plain Python over explicit state.

Fairness. Each tenant has a counter of the work done for it: one for each token of a prompt, two for each token of an answer
(the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models"). Whenever a row is free, the
waiting tenant with the lowest counter gets it, and among the rows with prompts to process, that of such a tenant is next,
together with others if what is left of their prompts is as short. A
tenant that arrives starts with the lowest counter of those that are there, so that nobody saves up work by waiting. The
requests of one tenant are served in the order of arrival. A tenant without a row does not wait for the end of others' long
answers: the tenant with the most rows, if it has at least two, gives one back (`preempt`). Its answer waits at the head of
its queue and is continued later.

Limits. A full queue refuses requests (`BusyError`), for all tenants together and for each.

Shared beginnings. A row keeps its keys and values after its answer has ended. A new answer takes over the longest beginning
that it shares with the text of a row with the same key (adapter, and regime of the positions): it continues in that row if
this is free and the whole of its text is shared; otherwise it goes to the free row that was used least recently, into which
the other row is copied.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Sequence

from qlora_jax.errors import OptionError, QLoRAError
from qlora_jax.serve.answer import Answer

__all__ = ["SHORT", "BusyError", "Limits", "Placement", "Scheduler"]

SHORT = 16  # tokens of a prompt that are processed at a time together with those of other prompts
_ANSWER_WEIGHT = 2.0
_STEP_COSTS = 128  # tokens: a step costs about as much as processing so many more, whatever it processes
_LEAST_SHARED = 16  # tokens; a shorter beginning is processed again


class BusyError(QLoRAError):
    """The queue is full: try again later."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The sizes of the engine.

    Attributes:
        rows: answers that run at a time.
        capacity: the most tokens of a prompt with its answer.
        chunk: tokens of prompts that are processed at a time, between two tokens of the answers that run: those of one
            prompt, or `SHORT` of each of several.
        waiting: answers that may wait for a row, of all tenants.
        waiting_per_tenant: and of one tenant.

    Raises:
        OptionError: a size below 1, or a capacity below 2.
    """

    rows: int = 8
    capacity: int = 2048
    chunk: int = 128
    waiting: int = 1024
    waiting_per_tenant: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 2 if field.name == "capacity" else 1
            if value < least:
                raise OptionError(f"{field.name}: expected at least {least}, found {value}")


@dataclasses.dataclass(frozen=True)
class Placement:
    """An answer's place: its row, and the row whose first `shared` tokens it takes over (None: it takes over none)."""

    answer: Answer
    row: int
    source: int | None
    shared: int


@dataclasses.dataclass
class _Row:
    """The text whose keys and values a row contains.

    Attributes:
        answer: the answer that runs in the row; None: the row is free.
        key, tokens: the text that the last answer left, if the row is free.
        used: a number that grows with the time when the row became free.
    """

    answer: Answer | None = None
    key: tuple[object, ...] = ()
    tokens: Sequence[int] = ()
    used: int = 0

    def text(self) -> tuple[tuple[object, ...], Sequence[int]]:
        """Return (the key, the tokens) of the text."""
        if self.answer is None:
            return self.key, self.tokens
        return self.answer.key, self.answer.tokens[: self.answer.written]


class Scheduler:
    """The queues of the tenants and the rows of the engine."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rows = [_Row() for _ in range(limits.rows)]
        self.waiting: dict[str, deque[Answer]] = {}
        self.served: dict[str, float] = {}
        self._clock = 0

    @property
    def count_waiting(self) -> int:
        """The number of answers that wait for a row."""
        return sum(map(len, self.waiting.values()))

    def running(self) -> list[Answer]:
        """Return the answers that have a row."""
        return [row.answer for row in self.rows if row.answer is not None]

    def enqueue(self, answers: Sequence[Answer]) -> None:
        """Add the answers of one request to the queue of its tenant.

        Raises:
            BusyError: there are too many; none of them is added.
        """
        tenant, count = answers[0].request.tenant, len(answers)
        queue, limits = self.waiting.get(tenant, ()), self.limits
        if self.count_waiting + count > limits.waiting:
            raise BusyError(f"queue: expected at most {limits.waiting} waiting answers, found {self.count_waiting + count}")
        if len(queue) + count > limits.waiting_per_tenant:
            found = len(queue) + count
            raise BusyError(f"queue: expected at most {limits.waiting_per_tenant} waiting answers of one key, found {found}")
        present = self._present()
        if tenant not in present:
            if not present:
                self.served.clear()
            self.served[tenant] = max(self.served.get(tenant, 0.0), min((self.served[x] for x in present), default=0.0))
        self.waiting.setdefault(tenant, deque()).extend(answers)

    def preempt(self, ready: Callable[[Answer], bool]) -> Answer | None:
        """Take back a row for a tenant that waits and has none; return the answer that lost it, which waits again.

        Args:
            ready: whether an answer could use a row now; nobody gives up a row for an adapter that is being read.
        """
        running = self.running()
        if len(running) < len(self.rows):
            return None
        rows = Counter(answer.request.tenant for answer in running)
        # Each is asked for, so that all their adapters are read.
        ready_ones = [ready(queue[0]) for tenant, queue in self.waiting.items() if tenant not in rows]
        if not any(ready_ones):
            return None
        tenant, count = max(rows.items(), key=lambda item: (item[1], self.served[item[0]]))
        if count < 2:
            return None
        answer = max((answer for answer in running if answer.request.tenant == tenant), key=lambda one: one.ticket)
        self.release(answer)
        self.waiting.setdefault(tenant, deque()).appendleft(answer)
        return answer

    def place(self, acquire: Callable[[Answer], bool]) -> list[Placement]:
        """Give free rows to waiting answers.

        Args:
            acquire: sets the slot and the key of an answer; returns whether its adapter is available now. If it is not, the
                answer's tenant waits.
        """
        placed: list[Placement] = []
        skipped: set[str] = set()
        while any(row.answer is None for row in self.rows):
            tenants = [tenant for tenant in self.waiting if tenant not in skipped]
            if not tenants:
                break
            tenant = min(tenants, key=lambda name: self.served[name])
            answer = self.waiting[tenant][0]
            if not acquire(answer):
                skipped.add(tenant)
                continue
            self._dequeue(answer)
            placement = self._row_for(answer)
            answer.row, answer.written = placement.row, placement.shared
            self.rows[placement.row] = _Row(answer)
            # What it waited for counts at once, so that the tenant's next request does not come before those of others.
            self.served[tenant] += answer.target - placement.shared
            placed.append(placement)
        return placed

    def next_prefills(self, together: Sequence[int], reach: int) -> tuple[list[Answer], bool]:
        """Return (the running answers whose prompts are to be processed next, whether `SHORT` tokens of each).

        The answer whose turn it is is one of them. What a step does for the time that it takes decides how many join it.

        Args:
            together: the numbers of prompts of which `SHORT` tokens each can be processed at a time.
            reach: the number of first tokens of a text within which this is possible.
        """
        prefills = [answer for answer in self.running() if answer.prefills]
        prefills.sort(key=lambda answer: (self.served[answer.request.tenant], answer.ticket))
        short = [one for one in prefills if one.target - one.written <= 2 * SHORT and one.written + SHORT <= reach]
        if not short or short[0] is not prefills[0]:
            return prefills[:1], False

        def worth(count: int, width: int) -> float:
            tokens = sum(min(width, one.target - one.written) for one in short[:count])
            return tokens / (count * width + _STEP_COSTS)

        count = max(together, key=lambda count: worth(count, SHORT), default=0)
        if not count or worth(1, self.limits.chunk) >= worth(count, SHORT):
            return prefills[:1], False
        return short[:count], True

    def drew(self, answer: Answer) -> None:
        """Count a token of an answer."""
        self.served[answer.request.tenant] += _ANSWER_WEIGHT

    def release(self, answer: Answer) -> None:
        """Take a waiting answer out of its queue, or free the row of a running one."""
        if answer.row is None:
            self._dequeue(answer)
            return
        self._clock += 1
        # The last token that the host knows may not have been written yet.
        self.rows[answer.row] = _Row(None, answer.key, tuple(answer.tokens[: answer.written]), self._clock)
        answer.row = None

    def _present(self) -> set[str]:
        return {*self.waiting, *(answer.request.tenant for answer in self.running())}

    def _dequeue(self, answer: Answer) -> None:
        queue = self.waiting[answer.request.tenant]
        queue.remove(answer)
        if not queue:
            del self.waiting[answer.request.tenant]

    def _row_for(self, answer: Answer) -> Placement:
        most = len(answer.tokens) - 1  # the last token is processed in any case: its logits are not stored
        shared = [_common(answer, *row.text(), most) for row in self.rows]
        free = [index for index, row in enumerate(self.rows) if row.answer is None]
        best = max(range(len(self.rows)), key=lambda index: shared[index])
        if shared[best] < _LEAST_SHARED:
            return Placement(answer, min(free, key=lambda index: self.rows[index].used), None, 0)
        whole = [index for index in free if shared[index] == shared[best] >= len(self.rows[index].tokens) - 1]
        row = whole[0] if whole else min(free, key=lambda index: self.rows[index].used)
        return Placement(answer, row, best if shared[row] < shared[best] else row, shared[best])


def _common(answer: Answer, key: tuple[object, ...], tokens: Sequence[int], most: int) -> int:
    """Return the number of first tokens that an answer shares with a text, at most `most`."""
    if key != answer.key:
        return 0
    pairs = zip(answer.tokens[:most], tokens, strict=False)
    return next((index for index, (own, other) in enumerate(pairs) if own != other), min(most, len(tokens)))
