"""The engine against each request alone, whatever joins, leaves or is cancelled; its draws, its limits, what it compiles.

About 8 CPU-seconds, most of it compiling the programs of a tiny Llama.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from test_generate import VOCABULARY, Successor, random_prompts, tiny, with_scaling, without_cache

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.serve import generate, programs
from qlora_jax.serve.device import Device
from qlora_jax.serve.engine import Engine, PromptError
from qlora_jax.serve.interfaces import NoAdapters
from qlora_jax.serve.request import Choices, Request
from qlora_jax.serve.scheduler import BusyError, Limits

LIMITS = Limits(rows=3, capacity=128, chunk=48)
LENGTHS = (1, 5, 63, 64, 30, 17, 16)


def make(model: nnx.Module, limits: Limits = LIMITS, vocabulary: int = VOCABULARY, **options: Any) -> Engine:
    return Engine(*nnx.split(model), limits=limits, vocabulary=vocabulary, **options)


@functools.cache
def engine() -> Engine:
    made = make(tiny())
    made.warm_up()
    return made


def run(engine: Engine, arrivals: Iterable[tuple[int, Request]], cancel: Sequence[tuple[int, int]] = ()) -> list[list[Any]]:
    """Return the events of each request, in the order of arrival.

    Args:
        arrivals: (step, request), sorted by step.
        cancel: (step, index of the request to cancel then).
    """
    waiting, tickets, step = list(arrivals), [], 0
    events: dict[int, list[Any]] = {}
    while waiting or engine.busy:
        while waiting and waiting[0][0] <= step:
            tickets.append(engine.submit(waiting.pop(0)[1]))
        for at, index in cancel:
            if at == step:
                engine.cancel(tickets[index])
        for event in engine.step():
            events.setdefault(event.ticket, []).append(event)
        step += 1
    return [events[ticket] for ticket in tickets]


def tokens(events: Sequence[Any], number: int = 0) -> list[int]:
    return [token for event in events if event.number == number for token in event.tokens]


def ask(engine: Engine, *requests: Request) -> list[list[int]]:
    return [tokens(events) for events in run(engine, [(0, request) for request in requests])]


def request(prompt: Sequence[int], count: int = 12, **fields: Any) -> Request:
    names = {field.name for field in dataclasses.fields(Choices)}
    choices = Choices(**{name: value for name, value in fields.items() if name in names})
    return Request(tuple(prompt), count, choices, **{name: value for name, value in fields.items() if name not in names})


def programs_compiled() -> list[int]:
    made = (programs.prefill_chunk, programs.decode_rows, programs.sample_rows, programs.begin_row, programs.copy_row)
    return [program._cache_size() for program in made]


def free_rows(engine: Engine) -> int:
    return sum(row.answer is None for row in engine.scheduler.rows)


def test_each_answer_is_that_of_the_request_alone_whatever_joins_leaves_or_is_cancelled() -> None:
    prompts, tried = random_prompts(LENGTHS), engine()
    expected = generate(*nnx.split(tiny()), prompts, max_new_tokens=20)
    before = programs_compiled()
    arrivals = [(3 * index, request(prompt, 20, tenant=str(index % 3))) for index, prompt in enumerate(prompts)]
    events = run(tried, arrivals, cancel=[(9, 1), (12, 4), (13, 2)])
    for index, (own, answer) in enumerate(zip(events, expected, strict=True)):
        cancelled = index in (1, 2, 4)
        assert [event.finish for event in own if event.finish] == ["cancelled" if cancelled else "length"]
        found = tokens(own)
        assert found == (answer[: len(found)] if cancelled else answer)
    assert free_rows(tried) == LIMITS.rows
    assert not tried.busy
    assert programs_compiled() == before  # nothing after the warm-up


def test_short_prompts_are_processed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a long one, whose turn comes; a rest of one prompt is processed with the beginnings of others."""
    pieces: list[tuple[int, ...]] = []

    def count(name: str) -> None:
        process = getattr(Device, name)

        def counted(device: Device, own: Any) -> None:
            pieces.append(tuple(len(piece.tokens) for piece in (own if isinstance(own, list) else [own])))
            process(device, own)

        monkeypatch.setattr(Device, name, counted)

    count("prefill")
    count("prefill_together")
    prompts, tried = random_prompts((3, 16, 20, 60, 5, 2)), engine()
    before = programs_compiled()
    found = ask(tried, *(request(prompt, 12, tenant=str(index)) for index, prompt in enumerate(prompts)))
    assert found == generate(*nnx.split(tiny()), prompts, max_new_tokens=12)
    assert pieces[:2] == [(3, 16, 16), (4,)]
    assert sum(map(sum, pieces)) == sum(map(len, prompts))
    assert (48,) in pieces
    assert programs_compiled() == before


def test_a_draw_depends_on_the_seed_and_the_request_alone() -> None:
    """The same request alone, as one of many, and with other settings beside it that need a sort."""
    prompts = random_prompts((9, 20, 3))
    drawn = request(prompts[0], temperature=1.3, min_p=0.01, seed=2**40 + 5, repetition_penalty=1.2)
    (alone,) = ask(engine(), drawn)
    limited = request(prompts[1], temperature=0.9, top_k=5, top_p=0.8, seed=1, top_logprobs=3)
    found = run(engine(), [(0, limited), (1, request(prompts[2])), (2, drawn), (2, dataclasses.replace(drawn, count=2))])
    assert tokens(found[2]) == tokens(found[3], 0) == alone
    assert tokens(found[3], 1) != alone  # the second answer to a request draws by itself
    other = dataclasses.replace(drawn, choices=dataclasses.replace(drawn.choices, seed=5))
    assert ask(engine(), other) != [alone]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_whose_rotations_depend_on_their_length(kind: str) -> None:
    """As if each text had been read at once: before the context, across it (in the prompt's chunks too) and beyond."""
    model, prompts = with_scaling(kind), random_prompts((36, 5, 44, 38))
    found = ask(make(model, Limits(rows=2, capacity=64, chunk=16)), *(request(prompt, 8) for prompt in prompts))
    assert found == [without_cache(model, prompt, 8) for prompt in prompts]


def test_beginnings_are_shared_by_running_and_finished_rows() -> None:
    """Of the same adapter only; an answer and its continuation need no copy."""
    (prompt,), tried = random_prompts((50,)), engine()
    texts = [[*prompt, *more] for more in ([1, 2, 3], [4, 5], [1, 2, 3, 6])]
    expected = generate(*nnx.split(tiny()), texts, max_new_tokens=6)
    before = dataclasses.replace(tried.counts)
    assert ask(tried, request(texts[0], 6)) == expected[:1]
    assert tried.counts.prompt_tokens - before.prompt_tokens == 53
    assert ask(tried, *(request(text, 6) for text in texts)) == expected
    assert tried.counts.prompt_tokens - before.prompt_tokens <= 53 + 1 + 2 + 1
    (answer,) = expected[:1]
    grown = [*texts[0], *answer[:5], 9]
    now = tried.counts.prompt_tokens
    assert ask(tried, request(grown, 4)) == generate(*nnx.split(tiny()), [grown], max_new_tokens=4)
    assert tried.counts.prompt_tokens - now <= 2


def test_what_an_earlier_text_left_in_a_row_does_not_reach_the_next_one() -> None:
    """Not even NaN, which one tenant's adapter may leave in a row: 0 times NaN is NaN."""
    prompts, tried = random_prompts((20, 3, 9)), make(tiny())
    ask(tried, *map(request, prompts))
    state = tried._device._state
    left = jax.tree.map(lambda leaf: jax.numpy.full_like(leaf, np.nan), state.cache)
    tried._device._state = dataclasses.replace(state, cache=left)
    others = random_prompts((7, 33, 18))
    assert ask(tried, *map(request, others)) == generate(*nnx.split(tiny()), others, max_new_tokens=12)


def test_few_and_many_rows_short_and_long_texts_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for 1 and 5 rows and for 12 and 48 tokens; answers grow from one into the other, and draws stay."""
    monkeypatch.setattr("qlora_jax.serve.device._LEAST_REACH", 12)
    prompts, tried = random_prompts((3, 20, 9, 1, 30)), make(tiny(), Limits(rows=5, capacity=40, chunk=8))
    tried.warm_up()
    before = programs_compiled()
    expected = generate(*nnx.split(tiny()), prompts, max_new_tokens=10)
    drawn = request(prompts[2], 10, temperature=1.2, top_p=0.9, seed=3)
    (alone,) = ask(tried, drawn)
    arrivals = [(5 * index, request(prompt, 10, tenant=str(index))) for index, prompt in enumerate(prompts)]
    events = run(tried, [*arrivals, (22, drawn)])
    assert [tokens(own) for own in events] == [*expected, alone]
    assert ask(tried, *(one for _, one in arrivals)) == expected
    assert programs_compiled() == before


def test_logprobs_are_those_of_the_model() -> None:
    (prompt,) = random_prompts((7,))
    (events,) = run(engine(), [(0, request(prompt, 3, top_logprobs=4, logit_bias={5: 100.0}))])
    assert tokens(events) == [5, 5, 5]  # the bias decides, and the log probabilities do not know of it
    graph, state = nnx.split(tiny())
    logits = nnx.merge(graph, state)(np.asarray([[*prompt, 5, 5]], np.int32))[0, len(prompt) - 1 :]
    for expected, event in zip(jax.nn.log_softmax(logits), events, strict=False):
        (found,) = event.logprobs
        order = np.argsort(-np.asarray(expected))[:4]
        assert [token for token, _ in found.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in found.top], expected[order], atol=1e-4)
        np.testing.assert_allclose(found.logprob, expected[5], atol=1e-4)


def successor(limits: Limits) -> Engine:
    return make(Successors(), limits, 32)


class Successors(Successor):
    """A decoder whose likeliest token is the last one plus 1, with a cache of rows."""

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        return jax.numpy.zeros((1, batch_size, capacity), jax.numpy.int32)

    def decode(self, tokens: jax.Array, positions: jax.Array, cache: Any, **_: Any) -> tuple[jax.Array, Any]:
        return super().decode(tokens, positions, cache)


def test_penalties_count_the_prompt_and_the_answer() -> None:
    """A step of the table is 4 logits: one occurrence costs 2, and a token that was there twice is no longer chosen."""
    small = Limits(rows=2, capacity=64, chunk=8)
    (answer,) = ask(successor(small), request([3], 4, logit_bias={9: 3.0}, presence_penalty=2.0, frequency_penalty=-2.0))
    assert answer == [4, 5, 6, 7]
    (answer,) = ask(successor(small), request([4, 3], 4, repetition_penalty=8.0, logit_bias={9: 1.0}))
    assert answer == [9, 10, 11, 12]  # 4 was in the prompt: a half of a logit
    (answer,) = ask(successor(small), request([3], 6, frequency_penalty=1.5, logit_bias={9: 20.0}))
    assert answer == [9] * 6
    (answer,) = ask(successor(small), request([3], 6, frequency_penalty=2.0, logit_bias={9: 7.0}))
    assert answer == [9, 9, 10, 11, 12, 13]


def test_tenants_share_the_rows_and_none_waits_for_long_answers() -> None:
    """One asks for much first; another one's short requests are answered long before the first is done."""
    tried = successor(Limits(rows=2, capacity=64, chunk=8))
    many = [(0, request([1], 30, tenant="many")) for _ in range(6)]
    few = [(4, request([5], 4, tenant="few")) for _ in range(3)]
    order: list[str] = []
    tickets = {tried.submit(one): "many" for _, one in many}
    for step in range(400):
        if step == 4:
            tickets |= {tried.submit(one): "few" for _, one in few}
        order += [tickets[event.ticket] for event in tried.step() if event.finish]
    assert order[:3] == ["few"] * 3
    assert Counter(order) == {"many": 6, "few": 3}
    assert not tried.busy
    assert free_rows(tried) == 2


def test_an_answer_that_lost_its_row_continues_as_if_it_had_not() -> None:
    prompts, tried = random_prompts((9, 12, 20, 25)), engine()
    draws: dict[str, Any] = {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.5}
    many = [request(prompt, 40, tenant="many", **draws) for prompt in prompts[:3]]
    alone = [ask(tried, one)[0] for one in many]
    found = run(tried, [*((0, one) for one in many), (8, request(prompts[3], 5, tenant="other"))])
    assert [tokens(events) for events in found[:3]] == alone
    ends = [max(index for index, event in enumerate(events) if event.tokens) for events in found]
    assert ends[3] == 4


def test_a_full_queue_refuses_and_takes_again() -> None:
    tried = successor(Limits(rows=1, capacity=32, chunk=8, waiting=3, waiting_per_tenant=2))
    for _ in range(2):
        tried.submit(request([1], 3, tenant="a"))
    with pytest.raises(BusyError, match="at most 2 waiting answers of one key, found 3"):
        tried.submit(request([1], 3, tenant="a"))
    tried.submit(request([1], 3, tenant="b"))
    with pytest.raises(BusyError, match="at most 3 waiting answers, found 4"):
        tried.submit(request([1], 3, tenant="c"))
    while tried.busy:
        tried.step()
    assert ask(tried, request([1], 3, tenant="a")) == [[2, 3, 4]]


def test_sizes_that_are_none_are_refused() -> None:
    for name, value in (("rows", 0), ("capacity", 1), ("chunk", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            Limits(**{name: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": [1] * 30, "count": 3}, r"at most 32 tokens, found 33: 30 in the prompt and 3 for the answer"),
        ({"prompt": [32], "count": 1}, r"prompt: expected tokens from 0 to 31, found 32"),
        ({"prompt": [1], "count": 1, "logit_bias": {-1: 0.5}}, r"logit_bias: expected tokens from 0 to 31, found -1"),
        ({"prompt": [1], "count": 1, "adapter": "other"}, "adapter: expected none, found other"),
        ({"prompt": [], "count": 0}, "prompt: expected at least one token, found none; max_new_tokens"),
        (
            {"prompt": [1], "count": 1, "temperature": float("nan")},
            "temperature: expected a number from 0 to 100, found nan",
        ),
        ({"prompt": [1], "count": 1, "seed": 2**65}, "seed: expected a whole number of at most 64 bits"),
    ],
)
def test_wrong_requests_are_refused(wrong: dict[str, Any], message: str) -> None:
    tried = successor(Limits(rows=1, capacity=32, chunk=8))
    with pytest.raises(ValueError, match=message):
        tried.submit(request(**wrong))
    assert not tried.busy
    assert issubclass(PromptError, ValueError)


class Broken(NoAdapters):
    """An adapter whose files cannot be read, for a reason that nobody thought of."""

    def check(self, name: str) -> None:
        pass

    def acquire(self, name: str) -> tuple[int, object] | None:
        if name:
            raise ZeroDivisionError
        return super().acquire(name)


def test_an_adapter_that_cannot_be_read_ends_its_own_answers_only() -> None:
    tried = make(Successors(), Limits(rows=2, capacity=32, chunk=8), 32, adapters=Broken())
    broken, other = run(tried, [(0, request([1], 3, adapter="a", tenant="a")), (0, request([1], 3, tenant="b"))])
    assert [(event.tokens, event.finish) for event in broken] == [((), "error")]
    assert tokens(other) == [2, 3, 4]
    assert not tried.busy


class Slow(Broken):
    """An adapter that is being read for some steps."""

    steps = 10

    def ready(self, name: str) -> bool:
        self.steps -= bool(name)
        return self.steps <= 0

    def acquire(self, name: str) -> tuple[int, object] | None:
        return (0, 0) if not name or self.steps <= 0 else None


def test_nobody_gives_up_a_row_for_an_adapter_that_is_being_read() -> None:
    tried = make(Successors(), Limits(rows=2, capacity=64, chunk=8), 32, adapters=Slow())
    for _ in range(2):
        tried.submit(request([1], 40, tenant="many"))
    tried.step()
    ticket, running = tried.submit(request([1], 3, adapter="a", tenant="few")), tried.scheduler.running()
    for _ in range(9):
        tried.step()
        assert tried.scheduler.running() == running
    tried.step()
    assert [answer.ticket for answer in tried.scheduler.running() if answer not in running] == [ticket]
    while tried.busy:
        tried.step()


class Replaced(NoAdapters):
    """Adapters of which another one may get the same name."""

    version = 1

    def check(self, name: str) -> None:
        pass

    def acquire(self, name: str) -> tuple[int, object] | None:
        return 0, self.version


def test_an_answer_does_not_go_on_with_another_adapter_of_the_same_name() -> None:
    """Two answers share all rows; one loses its row to another tenant, and its adapter is replaced meanwhile."""
    adapters = Replaced()
    tried = make(Successors(), Limits(rows=2, capacity=64, chunk=8), 32, adapters=adapters)
    kept, lost = (tried.submit(request([1], 20, adapter="a", tenant="many")) for _ in range(2))
    events = [event for _ in range(4) for event in tried.step()]
    other = tried.submit(request([1], 3, tenant="few"))
    events += tried.step()
    assert {answer.ticket for answer in tried.scheduler.running()} == {kept, other}
    adapters.version = 2
    while tried.busy:
        events += tried.step()
    ends = {event.ticket: event.finish for event in events if event.finish is not None}
    assert ends == {kept: "length", other: "length", lost: "error"}


def test_rows_are_counted_equal_after_many_cancellations() -> None:
    tried = successor(Limits(rows=3, capacity=32, chunk=8))
    draws = np.random.default_rng(0)
    for _ in range(100):
        tickets = [tried.submit(request([1] * int(draws.integers(1, 12)), 8)) for _ in range(int(draws.integers(1, 6)))]
        for _ in range(int(draws.integers(0, 6))):
            tried.step()
        for ticket in tickets:
            tried.cancel(ticket)
        tried.step()
    while tried.busy:
        tried.step()
    assert free_rows(tried) == 3
    assert tried.scheduler.count_waiting == 0
    assert ask(tried, request([1], 3)) == [[2, 3, 4]]


@pytest.mark.integration
def test_log_probabilities_equal_those_of_transformers(tiny_llama: Path) -> None:
    """Prompts in chunks, then token by token, in rows beside each other; about 3 CPU-seconds."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(str(tiny_llama))
    model = load_model(checkpoint, quantization=None, dtype=jax.numpy.float32, progress=False)
    size = checkpoint.model_config.vocab_size
    tried = make(model, Limits(rows=2, capacity=64, chunk=16), size)
    prompts = [np.random.default_rng(length).integers(0, size, length).tolist() for length in (40, 3)]
    events = run(tried, [(0, request(prompt, 8, top_logprobs=20)) for prompt in prompts])
    peer: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for prompt, own in zip(prompts, events, strict=True):
        answer = tokens(own)
        with torch.inference_mode():
            logits = peer(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).numpy()
        assert answer == expected.argmax(-1).tolist()
        found = [event.logprobs[0] for event in own if event.tokens]
        for row, one in zip(expected, found, strict=True):
            np.testing.assert_allclose([value for _, value in one.top], row[[token for token, _ in one.top]], atol=1e-3)
