"""The calls of OpenAI's API that ask for answers: from the JSON of a body to requests of the engine.

`POST /v1/chat/completions` and `POST /v1/completions`. Fields that the API has and this server does not support are refused
by name, as are fields that nobody knows. Beside OpenAI's fields, `top_k`, `min_p` and `repetition_penalty` are those of
`serve.request.Choices`, and `response_format` also takes `{"type": "regex", "pattern": …}` and
`{"type": "grammar", "grammar": …}` (`serve.grammars`).
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qlora_jax.serve.http_body import Fields
from qlora_jax.serve.http_errors import ApiError
from qlora_jax.serve.http_messages import Tools, read_messages, read_tools
from qlora_jax.serve.request import MOST_TOP_LOGPROBS, Choices, Request
from qlora_jax.serve.tool_calls import CallReader
from qlora_jax.serve.tool_format import ToolFormat, calls_grammar

__all__ = ["Call", "Prepared", "chat_call", "completion_call"]

_MOST_ANSWERS, _MOST_PROMPTS, _MOST_STOPS, _MOST_BIASES = 128, 128, 16, 1024
# What a client may say about itself or about OpenAI's own machines; it changes no answer.
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call whose fields are checked; its prompts are not tokens yet.

    Attributes:
        kind: which path was called.
        model: the name of the model.
        prompts: of a chat, one list of messages; otherwise texts or token ids.
        choices: how tokens are chosen.
        count: the number of answers to each prompt.
        max_new_tokens: the most tokens of an answer; None: as many as there is room for.
        stop: texts that end an answer.
        top_logprobs: as in `Request`.
        stream: whether the answers are sent as they are made.
        usage: whether a stream ends with the number of tokens.
        grammar: what the answers must obey, or None.
        tools: what the answers may or must call; None: nothing.
    """

    kind: Literal["chat", "completion"]
    model: str
    prompts: tuple[Any, ...]
    choices: Choices
    count: int
    max_new_tokens: int | None
    stop: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    usage: bool
    grammar: Any = None
    tools: Tools | None = None

    def requests(self, prepared: "Prepared", *, adapter: str, tenant: str) -> list[Request]:
        """Return the requests of the engine, one for each prompt."""
        chat, found = self.kind == "chat", []
        grammar, tools = self._grammar(prepared), [tool.given for tool in self.tools.tools] if self.tools else []
        for prompt in self.prompts:
            tokens = prepared.chat(prompt, tools) if chat else prepared.text(prompt) if isinstance(prompt, str) else prompt
            if not tokens:
                raise ApiError(400, "prompt: expected at least one token, found none.", param="prompt", code="invalid_value")
            room = max(1, prepared.capacity - len(tokens))
            count = room if self.max_new_tokens is None else self.max_new_tokens
            found.append(
                Request(
                    tuple(tokens),
                    count,
                    self.choices,
                    self.count,
                    prepared.eos_ids,
                    self.stop,
                    self.top_logprobs,
                    adapter,
                    tenant,
                    continues=not chat,
                    grammar=grammar,
                )
            )
        return found

    def readers(self, prepared: "Prepared", count: int) -> "list[CallReader] | None":
        """Return the readers of the calls in so many answers; None: they call nothing."""
        if self.tools is None or prepared.calls is None:
            return None
        names = [tool.name for tool in self.tools.tools]
        return [CallReader(prepared.calls, names, many=self.tools.many) for _ in range(count)]

    def _grammar(self, prepared: "Prepared") -> Any:
        """Return what the answers must obey, tools included."""
        called = self.kind == "chat" and any("tool_calls" in message for message in self.prompts[0])
        if (self.tools is not None or called) and prepared.calls is None:
            raise ApiError(
                400,
                "tools: the chat template of this model has no tools; another template can be chosen where the server is "
                "started (--chat-template).",
                param="tools" if self.tools is not None else "messages",
                code="unsupported_parameter",
            )
        if self.tools is None or prepared.calls is None:
            return self.grammar
        if not self.tools.required:
            if self.grammar is not None:
                raise ApiError(
                    400,
                    "response_format is not supported beside tools that the answer may call; choose tool_choice none or "
                    "required.",
                    param="response_format",
                    code="unsupported_parameter",
                )
            return None
        return "lark", calls_grammar(self.tools.tools, prepared.calls, prepared.markers, many=self.tools.many)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """How prompts become tokens.

    Attributes:
        chat: maps messages and tools to the tokens up to the start of the answer; raises QLoRAError where it cannot.
        text: maps a text to its tokens.
        eos_ids: the tokens that end an answer.
        capacity: the most tokens of a prompt with its answer.
        calls: how the model writes calls of tools; None: it has none.
        markers: the parts of calls that are special tokens, by their ids (`tool_format.special_markers`).
    """

    chat: Callable[[Sequence[dict[str, Any]], Sequence[Any]], Sequence[int]]
    text: Callable[[str], Sequence[int]]
    eos_ids: frozenset[int]
    capacity: int
    calls: ToolFormat | None = None
    markers: Mapping[int, str] = dataclasses.field(default_factory=dict)


def chat_call(body: dict[str, Any]) -> Call:
    """Return the call of a body of `/v1/chat/completions`.

    Raises:
        ApiError: a field that is missing, wrong, unknown or not supported.
    """
    fields = Fields(body)
    prompt, tools = read_messages(fields), read_tools(fields)
    fields.unsupported("audio", "prediction", "web_search_options")
    fields.unsupported("modalities", but=(["text"],))
    fields.unsupported("store", but=(False,))
    fields.unsupported("reasoning_effort", "verbosity")
    logprobs, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top is not None and not logprobs:
        fields.wrong("top_logprobs", "logprobs: true beside it", top)
    most = 2**31 - 1
    longest = fields.whole("max_completion_tokens", 1, most), fields.whole("max_tokens", 1, most)
    return Call(
        kind="chat",
        prompts=(prompt,),
        max_new_tokens=longest[0] or longest[1],
        top_logprobs=(top or 0) if logprobs else None,
        grammar=_response_format(fields.fields("response_format")),
        tools=tools,
        **_common(fields),
    )


def completion_call(body: dict[str, Any]) -> Call:
    """Return the call of a body of `/v1/completions`; see `chat_call`."""
    fields = Fields(body)
    prompts = _prompts(fields)
    fields.unsupported("suffix", but=("",))
    fields.unsupported("echo", but=(False,))
    fields.unsupported("best_of", but=(body.get("n") or 1,))
    limit = fields.whole("max_tokens", 1, 2**31 - 1)
    return Call(
        kind="completion",
        prompts=prompts,
        max_new_tokens=16 if limit is None else limit,  # OpenAI's default
        top_logprobs=fields.whole("logprobs", 0, MOST_TOP_LOGPROBS),
        **_common(fields),
    )


def _common(fields: Fields) -> dict[str, Any]:
    """Return the fields of both calls; none may be left after them."""
    stream, options, usage = fields.flag("stream"), fields.fields("stream_options"), False
    if options is not None:
        if not stream:
            fields.wrong("stream_options", "stream: true beside it", {})
        usage = options.flag("include_usage")
        options.ignore("include_obfuscation")
        options.none_left()
    seed, temperature = fields.whole("seed", -(2**63), 2**63 - 1), fields.number("temperature", 0, 2)
    choices = Choices(
        temperature=1.0 if temperature is None else temperature,
        top_k=fields.whole("top_k", 1, 2**31 - 1),
        top_p=_top_p(fields),
        min_p=fields.number("min_p", 0, 1) or 0.0,
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100) or 1.0,
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        logit_bias=_bias(fields),
        seed=secrets.randbits(63) if seed is None else seed,
    )
    common = {
        "model": fields.must("model", fields.text("model")),
        "choices": choices,
        "count": fields.whole("n", 1, _MOST_ANSWERS) or 1,
        "stop": _stops(fields),
        "stream": stream,
        "usage": usage,
    }
    fields.ignore(*_WITHOUT_EFFECT)
    fields.none_left()
    return common


def _top_p(fields: Fields) -> float | None:
    value = fields.number("top_p", 0, 1)
    if value == 0:
        fields.wrong("top_p", "a number above 0", value)
    return value


def _prompts(fields: Fields) -> tuple[Any, ...]:
    prompt = fields.must("prompt", fields.any("prompt"))
    if isinstance(prompt, str):
        return (prompt,)
    is_list = isinstance(prompt, list) and bool(prompt)
    if is_list and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return (_tokens(fields, prompt),)
    if not is_list or len(prompt) > _MOST_PROMPTS:
        fields.wrong("prompt", f"a text, token ids, or a list of 1 to {_MOST_PROMPTS} of them", prompt)
    if all(isinstance(one, str) for one in prompt):
        return tuple(prompt)
    if not all(
        isinstance(one, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in one)
        for one in prompt
    ):
        fields.wrong("prompt", "a text, token ids, or a list of them", prompt)
    return tuple(_tokens(fields, one) for one in prompt)


def _tokens(fields: Fields, tokens: list[int]) -> tuple[int, ...]:
    if any(not 0 <= token < 2**31 for token in tokens):
        fields.wrong("prompt", "token ids from 0 on", tokens)
    return tuple(tokens)


def _stops(fields: Fields) -> tuple[str, ...]:
    stop = fields.any("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(x, str) and x for x in stops):
        fields.wrong("stop", f"a text or a list of at most {_MOST_STOPS} texts, none of them empty", stop)
    return tuple(stops)


def _bias(fields: Fields) -> dict[int, float]:
    bias = fields.any("logit_bias")
    if bias is None:
        return {}
    if not isinstance(bias, dict) or len(bias) > _MOST_BIASES:
        fields.wrong("logit_bias", f"an object of at most {_MOST_BIASES} token ids", bias)
    found = {}
    for token, value in bias.items():
        right = isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
        if not (right and token.isascii() and token.isdecimal() and len(token) < 10):
            fields.wrong("logit_bias", "numbers from -100 to 100 by token ids", bias)
        found[int(token)] = float(value)
    return found


def _response_format(fields: Fields | None) -> Any:
    """Return the grammar of an answer (`serve.grammars`), or None."""
    if fields is None:
        return None
    kind = fields.must("type", fields.text("type", choices=("text", "json_object", "json_schema", "regex", "grammar")))
    found: Any = None
    if kind == "json_object":
        found = "json", {"type": "object"}
    elif kind == "json_schema":
        given = fields.must("json_schema", fields.fields("json_schema"))
        given.must("name", given.text("name"))
        given.text("description")
        given.flag("strict")  # an answer always obeys its schema
        schema = given.must("schema", given.any("schema"))
        if not isinstance(schema, dict):
            given.wrong("schema", "an object", schema)
        given.none_left()
        found = "json", schema
    elif kind == "regex":
        found = "regex", fields.must("pattern", fields.text("pattern"))
    elif kind == "grammar":
        found = "lark", fields.must("grammar", fields.text("grammar"))
    fields.none_left()
    return found
