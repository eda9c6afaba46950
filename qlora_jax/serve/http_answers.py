"""The answers of OpenAI's API: one JSON object when all answers have ended, or a stream of server-sent events.

    data: {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "Par"}, …}], …}
    …
    data: [DONE]

A stream that is silent for some seconds sends a comment, so that nobody on the way takes it for dead and a client that has
gone is noticed. If the server fails or stops in the middle of a stream, an event with an error comes last.
"""

import asyncio
import dataclasses
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from qlora_jax.serve.answer import Event, TokenLogprobs
from qlora_jax.serve.http_calls import Call, Prepared
from qlora_jax.serve.http_errors import ApiError
from qlora_jax.serve.tool_calls import Part

__all__ = ["Asked", "stream_answers", "whole_answers"]

_SILENCE_SECONDS = 10.0
_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_INTERRUPTED = "The server stopped before the answer was complete."


@dataclasses.dataclass
class Asked:
    """A call whose requests were given to the engine.

    Attributes:
        call: the call.
        tickets: the number of each prompt, by the ticket of its request.
        prompt_tokens: the tokens of all prompts.
        events: the events of all its requests, as they come.
        prepared: how prompts became tokens, and how calls of tools are written.
        token_text: returns (the text, the bytes) of a token.
        identity, created: the id and the time in the response.
        on_first: called with the first token of the answers.
    """

    call: Call
    tickets: dict[int, int]
    prompt_tokens: int
    events: "asyncio.Queue[Event]"
    prepared: Prepared
    token_text: Callable[[int], tuple[str, bytes]]
    identity: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    on_first: Callable[[], None] = lambda: None
    answer_tokens: int = 0
    running: int = 0

    def __post_init__(self) -> None:
        self.running = len(self.tickets) * self.call.count
        self._readers = self.call.readers(self.prepared, self.running)

    async def next(self, seconds: float | None) -> tuple[int, Event] | None:
        """Return (the index of the answer in the response, its next event), or None after so many seconds of silence.

        Raises:
            ApiError: the server failed, or stopped before the answer ended.
        """
        try:
            event = await asyncio.wait_for(self.events.get(), seconds)
        except TimeoutError:
            return None
        if event.finish in ("error", "cancelled"):
            raise ApiError(503 if event.finish == "cancelled" else 500, _INTERRUPTED, code="interrupted")
        if event.tokens and not self.answer_tokens:
            self.on_first()
        self.answer_tokens += len(event.tokens)
        self.running -= event.finish is not None
        return self.tickets[event.ticket] * self.call.count + event.number, event

    def parts(self, index: int, event: Event) -> list[Part]:
        """Return what the event adds to an answer: text, and calls of tools."""
        if self._readers is None:
            return [Part(event.text)] if event.text else []
        reader, markers = self._readers[index], self.prepared.markers
        # The text has no special tokens, but may have held text back that comes before them.
        found = reader.push(event.text + "".join(markers.get(token, "") for token in event.tokens))
        return found if event.finish is None else found + reader.finish()

    def finish(self, index: int, event: Event) -> str | None:
        """Return why an answer has ended, as clients read it; None: it goes on."""
        calls = self._readers is not None and self._readers[index].calls > 0
        return "tool_calls" if calls and event.finish == "stop" else event.finish

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields of a response, or of a chunk of it, beside its choices."""
        prefix = "chatcmpl" if self.call.kind == "chat" else "cmpl"
        return {"id": f"{prefix}-{self.identity}", "object": kind, "created": self.created, "model": self.call.model}

    def usage(self) -> dict[str, int]:
        """Return the number of tokens so far."""
        total = self.prompt_tokens + self.answer_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.answer_tokens, "total_tokens": total}


@dataclasses.dataclass
class _Whole:
    texts: list[str] = dataclasses.field(default_factory=list)
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def add(self, part: Part) -> None:
        if part.call is None:
            self.texts.append(part.text)
        elif part.name is not None:
            self.calls.append(_new_call(part.name, part.text))
        else:
            self.calls[part.call]["function"]["arguments"] += part.text

    def message(self) -> dict[str, Any]:
        text = "".join(self.texts)
        message = {"role": "assistant", "content": text or (None if self.calls else ""), "refusal": None}
        return message | ({"tool_calls": self.calls} if self.calls else {})


async def whole_answers(asked: Asked) -> dict[str, Any]:
    """Return the response when all answers have ended.

    Raises:
        ApiError: the server failed or stopped.
    """
    call = asked.call
    answers = [_Whole() for _ in range(asked.running)]
    while asked.running:
        found = await asked.next(None)
        if found is not None:
            index, event = found
            for part in asked.parts(index, event):
                answers[index].add(part)
            answers[index].logprobs += event.logprobs
            answers[index].finish = asked.finish(index, event)
    choices = []
    for index, answer in enumerate(answers):
        logprobs = None if call.top_logprobs is None else _logprobs(asked, answer.logprobs, 0)
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": answer.finish}
        choice |= {"message": answer.message()} if call.kind == "chat" else {"text": "".join(answer.texts)}
        choices.append(choice)
    kind = "chat.completion" if call.kind == "chat" else "text_completion"
    return asked.head(kind) | {"choices": choices, "usage": asked.usage()}


async def stream_answers(asked: Asked) -> AsyncIterator[str]:
    """Yield the server-sent events of the response."""
    call, chat = asked.call, asked.call.kind == "chat"
    head = asked.head("chat.completion.chunk" if chat else "text_completion")
    usage: dict[str, Any] = {"usage": None} if call.usage else {}
    offsets = [0] * asked.running

    def chunk(index: int, added: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> str:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        choice |= {"delta": added} if chat else {"text": added.get("content", "")}
        return _event(head | {"choices": [choice]} | usage)

    try:
        if chat:
            for index in range(asked.running):
                yield chunk(index, {"role": "assistant", "content": ""})
        while asked.running:
            found = await asked.next(_SILENCE_SECONDS)
            if found is None:
                yield ": working\n\n"
                continue
            index, event = found
            deltas = [_delta(part) for part in asked.parts(index, event)]
            logprobs = None
            if event.logprobs and call.top_logprobs is not None:
                logprobs = _logprobs(asked, event.logprobs, offsets[index])
                deltas = deltas or [{"content": ""}]
            for delta in deltas:  # the log probabilities come once
                yield chunk(index, delta, logprobs)
                logprobs = None
            offsets[index] += len(event.text)
            if event.finish is not None:
                yield chunk(index, {}, None, asked.finish(index, event))
        if call.usage:
            yield _event(head | {"choices": [], "usage": asked.usage()})
    except ApiError as error:  # the status of the response was sent long ago
        yield _event(error.body())
        return
    yield "data: [DONE]\n\n"


def _new_call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _delta(part: Part) -> dict[str, Any]:
    """Return what a chunk of a stream has of a part."""
    if part.call is None:
        return {"content": part.text}
    if part.name is not None:
        return {"tool_calls": [{"index": part.call} | _new_call(part.name, part.text)]}
    return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _logprobs(asked: Asked, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    if asked.call.kind == "chat":
        return {"content": [_chat_token(asked, token) for token in tokens], "refusal": None}
    texts = [asked.token_text(token.token)[0] for token in tokens]
    offsets = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
    top = [{asked.token_text(token)[0]: _finite(value) for token, value in one.top} for one in tokens]
    values = [_finite(token.logprob) for token in tokens]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _chat_token(asked: Asked, token: TokenLogprobs) -> dict[str, Any]:
    def one(token: int, value: float) -> dict[str, Any]:
        text, data = asked.token_text(token)
        return {"token": text, "logprob": _finite(value), "bytes": list(data)}

    return one(token.token, token.logprob) | {"top_logprobs": [one(*pair) for pair in token.top]}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST_LOGPROB
