"""Answers of an engine to a list of requests that is known from the start, as each ends, without a thread.

No more requests wait in the engine than it needs to keep its rows busy, so that its queue never refuses one.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeVar

from qlora_jax.serve.answer import Finish
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.request import Request

__all__ = ["Answered", "answer_all"]

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer.

    Attributes:
        text: the whole text.
        tokens: the tokens, without the one that ended the answer.
        finish: why it ended: "stop", "length", or "error".
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish


def answer_all(engine: Engine, requests: Mapping[K, Request]) -> Iterator[tuple[K, Answered]]:
    """Yield (the key of a request, its answer) for all requests of one answer each, in the order in which they end.

    Raises:
        OptionError: a request that the engine cannot answer; it is raised before any is answered.
    """
    for request in requests.values():
        engine.check(request)
    waiting = list(requests.items())[::-1]
    running: dict[int, tuple[K, list[str], list[int]]] = {}
    while waiting or running:
        while waiting and len(running) < 2 * engine.limits.rows:
            key, request = waiting.pop()
            running[engine.submit(request)] = (key, [], [])
        for event in engine.step():
            key, texts, tokens = running[event.ticket]
            texts.append(event.text)
            tokens += event.tokens
            if event.finish is not None:
                del running[event.ticket]
                yield key, Answered("".join(texts), tuple(tokens), event.finish)
