"""Continuous batching: answers to requests that come, go and are cancelled at any time share the rows of one batch.

    step    place     waiting answers get free rows (`scheduler`)
            launch    one chunk of one prompt, or a few tokens of several prompts; one token for each row that has its prompt
                      behind it; one draw for each row that has new logits (`programs`)
            collect   read the tokens of the launch before, and tell what became of the answers (`Event`)

The device computes a launch while the host handles the tokens of the one before: the token that a row drew is the next
launch's input without leaving the device. So an answer that ends with a token costs one step of its row that nobody needs.
A row that must know its last token first leaves out one launch: where a grammar restricts the next one, and where the text
outgrows the length for which its keys are right (`LengthDependent.cache_lasts`), in which case its tokens are processed
again from the first one on, like a prompt.

An answer is that of the request alone. Rows do not see each other, a row's keys and values are in slots of its own that are
read up to its length (`programs.begin_row` removes a NaN that an earlier text left behind it), and its draws depend on its
own seed and tokens (`row_sampling`).

All shapes are fixed (`Limits`), so that nothing is compiled after `warm_up`. The engine is not thread-safe: `serve.worker`
runs it in a thread of its own.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from qlora_jax.errors import OptionError
from qlora_jax.serve.answer import Answer, AnswerText, Event, Finish, TokenLogprobs
from qlora_jax.serve.device import Device, Piece
from qlora_jax.serve.generate import LengthDependent
from qlora_jax.serve.interfaces import Adapters, Grammar, NoAdapters
from qlora_jax.serve.request import Request
from qlora_jax.serve.row_sampling import Drawn, RowSettings
from qlora_jax.serve.scheduler import SHORT, Limits, Placement, Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Counts", "Engine", "PromptError"]

_logger = logging.getLogger(__name__)


class PromptError(OptionError):
    """A prompt that is too long together with its answer."""


@dataclasses.dataclass
class Counts:
    """What the engine has done so far: tokens of prompts processed and taken over, tokens drawn, and steps."""

    prompt_tokens: int = 0
    shared_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class _Launch:
    """Tokens that were drawn, and the answers that they belong to, each with its place among them."""

    drawn: Drawn
    answers: tuple[tuple[int, Answer], ...]


class Engine:
    """Answers requests; see the module."""

    def __init__(
        self,
        graphdef: nnx.GraphDef[Any],
        state: Any,
        *,
        limits: Limits,
        vocabulary: int,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        adapters: Adapters | None = None,
        constrain: Callable[[Any], Grammar] | None = None,
    ) -> None:
        """Create an engine without requests.

        Args:
            graphdef, state: `nnx.split` of a `programs.RowDecoder`. If it has a bank, the bank belongs to the engine from
                now on: its arrays are donated when a slot is written.
            limits: the sizes.
            vocabulary: the number of logits.
            tokenizer: makes the text of the answers; None: they have none.
            adapters: the adapters' slots; None: the model as it is.
            constrain: makes a grammar from `Request.grammar`; None: requests with a grammar are refused.
        """
        self.limits, self.counts, self.scheduler = limits, Counts(), Scheduler(limits)
        self._vocabulary, self._tokenizer, self._constrain = vocabulary, tokenizer, constrain
        self._adapters: Adapters = adapters or NoAdapters()
        self._device = Device(graphdef, state, limits, vocabulary, self._adapters)
        model = nnx.merge(graphdef, state)
        self._cache_lasts = model.cache_lasts if isinstance(model, LengthDependent) else lambda _: None
        self._tickets = itertools.count()
        self._answers: dict[int, list[Answer]] = {}
        self._grammars: dict[Answer, Grammar] = {}
        self._events: list[Event] = []
        self._without_adapter: list[Answer] = []
        self._in_flight: _Launch | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._answers or self._events or self._in_flight)

    @property
    def waits(self) -> bool:
        """Whether nothing is being computed: there is nothing to do, or adapters are being loaded."""
        return self._in_flight is None and not self._events and not self.scheduler.running()

    def running(self, ticket: int) -> bool:
        """Return whether a request has answers that have not ended."""
        return ticket in self._answers

    def check(self, request: Request) -> None:
        """Raise an error for a request that this engine cannot answer.

        Raises:
            PromptError: the prompt and the answer together are too long.
            OptionError: tokens outside the vocabulary, an unknown adapter, a grammar for an engine that has none, or more
                answers than fit into the queue.
        """
        total, capacity = len(request.prompt) + request.max_new_tokens, self.limits.capacity
        if total > capacity:
            raise PromptError(
                f"expected at most {capacity} tokens, found {total}: {len(request.prompt)} in the prompt and "
                f"{request.max_new_tokens} for the answer"
            )
        for name, tokens in (("prompt", request.prompt), ("logit_bias", request.choices.logit_bias)):
            if wrong := [token for token in tokens if not 0 <= token < self._vocabulary]:
                raise OptionError(f"{name}: expected tokens from 0 to {self._vocabulary - 1}, found {wrong[0]}")
        if request.count > self.limits.waiting_per_tenant:
            raise OptionError(f"count: expected at most {self.limits.waiting_per_tenant} answers, found {request.count}")
        if request.grammar is not None and self._constrain is None:
            raise OptionError("grammar: this engine cannot restrict answers")
        self._adapters.check(request.adapter)

    def grammars(self, request: Request) -> list[Grammar]:
        """Return the grammar of each answer to a request, none if it has no grammar; may be called in any thread.

        Raises:
            OptionError: a grammar that cannot be obeyed.
        """
        if request.grammar is None or self._constrain is None:
            return []
        first = self._constrain(request.grammar)
        return [first, *(first.copy() for _ in range(request.count - 1))]

    def submit(self, request: Request, grammars: Sequence[Grammar] | None = None) -> int:
        """Add a request; return its ticket, which its events bear.

        Args:
            request: the request.
            grammars: of `grammars`, if they were made before; None: they are made here.

        Raises:
            BusyError: the queue is full.
            OptionError: see `check`.
        """
        self.check(request)
        ticket = next(self._tickets)
        context = request.prompt if request.continues else ()
        answers = [
            Answer(ticket, number, request, list(request.prompt), AnswerText(self._tokenizer, request.stop, context))
            for number in range(request.count)
        ]
        grammars = self.grammars(request) if grammars is None else grammars
        self.scheduler.enqueue(answers)
        self._grammars.update(zip(answers, grammars, strict=False))
        self._answers[ticket] = answers
        return ticket

    def cancel(self, ticket: int) -> None:
        """End the answers to a request that have not ended yet; their rows are free at once."""
        for answer in list(self._answers.get(ticket, ())):
            self._end(answer, "cancelled")

    def step(self) -> list[Event]:
        """Do one step; return what happened."""
        if (answer := self.scheduler.preempt(lambda waiting: self._adapters.ready(waiting.request.adapter))) is not None:
            self._adapters.release(answer.slot)
        if placements := self.scheduler.place(self._acquire):
            self._device.install_adapters()
            for placement in placements:
                self._start(placement)
            self._set_settings()
        for answer in self._without_adapter:
            self._end(answer, "error")
        self._without_adapter.clear()
        launched = self._launch()
        if self._in_flight is not None:
            self._collect(self._in_flight)
        self._in_flight, events, self._events = launched, self._events, []
        return events

    def warm_up(self) -> None:
        """Compile all programs by running each once; the engine must have no requests."""
        self._device.warm_up()

    def _begin(self, answer: Answer) -> None:
        """Set what an answer needs before its tokens so far are processed from the first one on."""
        answer.target, answer.written = len(answer.tokens), 0
        answer.lasts = self._cache_lasts(answer.target)
        answer.key = (answer.request.adapter, answer.version, answer.lasts)

    def _acquire(self, answer: Answer) -> bool:
        if answer.known < answer.drawn:  # it lost its row in this step: a token of it is still to be read
            return False
        try:
            acquired = self._adapters.acquire(answer.request.adapter)
        except Exception:  # reading the files of one adapter may fail in any way, which must not end the answers of others
            _logger.exception("an adapter cannot be loaded")
            self._without_adapter.append(answer)
            return False
        if acquired is None:
            return False
        slot, version = acquired
        if answer.drawn and version != answer.version:  # one answer never comes from two adapters
            _logger.error("an adapter was replaced while an answer of it waited for a row again")
            self._adapters.release(slot)
            self._without_adapter.append(answer)
            return False
        answer.slot, answer.version = slot, version
        self._begin(answer)
        return True

    def _start(self, placement: Placement) -> None:
        answer, request = placement.answer, placement.answer.request
        if placement.source is not None and placement.source != placement.row:
            self._device.copy_row(placement.source, placement.row)
        self.counts.shared_tokens += placement.shared
        drawn = answer.tokens[len(request.prompt) :]
        self._device.begin_row(placement.row, list(request.prompt), drawn, request.choices.logit_bias)

    def _set_settings(self) -> None:
        answers = [row.answer for row in self.scheduler.rows]
        of_rows = [
            None if one is None else (one.request.choices, one.number, bool(one.request.top_logprobs)) for one in answers
        ]
        self._device.settings = jax.device_put(RowSettings.of(of_rows, self._vocabulary))

    def _launch(self) -> _Launch | None:
        draws = []
        prefills, together = self.scheduler.next_prefills(self._device.together, self._device.least_reach)
        if prefills:
            self._next_pieces(prefills, together)
            draws += [answer for answer in prefills if not answer.prefills]
        decodes = [other for other in self.scheduler.running() if other not in prefills and self._can_decode(other)]
        if decodes:
            self._device.decode([(other.row, other.written, other.slot) for other in decodes if other.row is not None])
            for other in decodes:
                other.written += 1
        draws += decodes
        if not draws:
            return None
        rows = [(other.row, other) for other in draws if other.row is not None]
        allowed = {row: self._grammars[other].allowed() for row, other in rows if other in self._grammars}
        places, drawn = self._device.draw([(row, other.drawn) for row, other in rows], allowed)
        for other in draws:
            other.drawn += 1
            self.scheduler.drew(other)
        self.counts.steps += 1
        return _Launch(drawn, tuple(zip(places, draws, strict=True)))

    def _next_pieces(self, answers: Sequence[Answer], together: bool) -> None:
        """Process the next tokens of the prompts of answers: `SHORT` of each if together, else a chunk of the only one."""
        pieces, most = [], SHORT if together else self.limits.chunk
        for answer in answers:
            if answer.row is not None:
                start, stop = answer.written, min(answer.written + most, answer.target)
                pieces.append(Piece(answer.tokens[start:stop], start, answer.row, answer.target, answer.slot))
                answer.written = stop
                self.counts.prompt_tokens += stop - start
        if together:
            self._device.prefill_together(pieces)
        else:
            self._device.prefill(*pieces)

    def _can_decode(self, answer: Answer) -> bool:
        """Return whether the last token of a running answer can be processed now; prepare it otherwise."""
        if answer.prefills or answer.drawn >= answer.request.max_new_tokens:
            return False
        if answer.lasts is not None and answer.written + 1 > answer.lasts:
            if answer.known == answer.drawn:
                self._begin(answer)
            return False
        return answer not in self._grammars or answer.known == answer.drawn

    def _collect(self, launch: _Launch) -> None:
        drawn = jax.device_get(launch.drawn)
        for place, answer in launch.answers:
            if answer.finished:
                continue
            token, request = int(drawn.token[place]), answer.request
            if token in request.eos_ids:
                self._end(answer, "stop")
                continue
            answer.tokens.append(token)
            self.counts.answer_tokens += 1
            text = answer.text.push(token)
            top = request.top_logprobs
            pairs = zip(drawn.top_tokens[place, :top].tolist(), drawn.top_logprobs[place, :top].tolist(), strict=True)
            logprobs = () if top is None else (TokenLogprobs(token, float(drawn.logprob[place]), tuple(pairs)),)
            self._events.append(Event(answer.ticket, answer.number, (token,), text, logprobs))
            complete = answer in self._grammars and self._grammars[answer].accept(token)
            if answer.text.stopped or complete:
                self._end(answer, "stop")
            elif answer.known >= request.max_new_tokens:
                self._end(answer, "length")

    def _end(self, answer: Answer, finish: Finish) -> None:
        if answer.finished:
            return
        answer.finished = True
        rest = answer.text.finish()
        self._events.append(Event(answer.ticket, answer.number, text=rest, finish=finish))
        if answer.row is not None:
            self._adapters.release(answer.slot)
        self.scheduler.release(answer)
        self._grammars.pop(answer, None)
        if all(other.finished for other in self._answers[answer.ticket]):
            del self._answers[answer.ticket]
