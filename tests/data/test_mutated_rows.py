"""Rows of every schema with random faults: each is learned rightly, left out and counted, or an error that names it.

About 5 s: 200 rows of each form.
"""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, encode_all, encode_all_seq2seq, encode_preferences, open_source
from qlora_jax.data.schemas import SCHEMAS

COUNT = 200
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima", "days": 2}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather in Lima?"}]},
    {"role": "assistant", "content": "Wait.", "weight": 0},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "Sunny.", "train": True},
]
MORE = {"system": "Be kind.", "history": [["Hi?", "Hello."]], "context": "Lima is dry.", "tools": "[]", "id": 7}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT, "tools": [], "id": "x"},
    "messages, calls": {
        "messages": [
            CHAT[1],
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": {"sky": "clear"}},
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
            {"role": "function", "name": "weather", "content": "rain"},
            CHAT[4],
        ],
        "functions": [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}],
    },
    "alpaca": {"instruction": "Add.", "input": "2, 3", "output": "5"} | MORE,
    "question/answer": {"question": "Add 2, 3.", "answer": "5"} | MORE,
    "input/output": {"input": "Add 2, 3.", "output": 5.5, "context": "Numbers."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "system": "Be kind.",
    },
    "instruction/response": {"instruction": "Add.", "context": "2, 3", "response": "5"},
    "prompt/completion": {"prompt": "Add: 2, 3 =", "completion": " 5"},
    "prompt/completion, messages": {"prompt": CHAT[:2], "completion": [CHAT[4]]},
    "text": {"text": "### Human: Hi ### Assistant: Hello"},
    "completion": {"completion": "Once upon a time."},
    "preferences": {"prompt": CHAT[:2], "chosen": [CHAT[4]], "rejected": "Rain.", "score": 3},
    "preferences, texts": {"prompt": "Add: ", "chosen": "5", "rejected": "6"},
}
VALUES: list[Any] = [
    None, "", " ", "text", 0, -1, 2.5, 1e300, float("nan"), True, [], {}, [None], [[]], [["a"]], {"a": None}, "[", "[{",
    '{"role": 3}', '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]', "<|im_start|>", "\ud83d",
    "\x00", "x" * 3000, [{"type": "image", "url": "u"}], [{"type": "text"}], {"role": "assistant", "content": "A"}, 10**400,
    [CALL], CHAT,
]  # fmt: skip
KEYS = ["role", "from", "content", "value", "tool_calls", "function_call", "weight", "train", "name", "", "text", "Role"]
ROLES = [
    "Human",
    "GPT",
    "model",
    "developer",
    "function",
    "tool",
    "narrator",
    "assistant ",
    3,
    None,
    "function_call",
    "system",
]


@pytest.fixture(scope="module")
def tokenizer(make_chatml: Any) -> PreTrainedTokenizerFast:
    """ChatML, which also writes tools and calls."""
    written = (
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% for call in message['tool_calls'] or [] %}"
    )
    written += "{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    tools = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    header = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return make_chatml(tools + "{% for message in messages %}" + written + "{% endfor %}" + header)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each part of a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def mutated(row: dict[str, Any], source: random.Random) -> Any:
    """Return the row with one to three faults."""
    row = copy.deepcopy(row)
    for _ in range(source.randint(1, 3)):
        found = list(places(row))
        if not found:
            return source.choice(VALUES)
        *path, key = source.choice(found)
        owner: Any = row
        for step in path:
            owner = owner[step]
        match source.randrange(6):
            case 0:
                del owner[key]
            case 1:
                owner[key] = copy.deepcopy(source.choice(VALUES))
            case 2 if isinstance(owner, dict):
                owner[source.choice(KEYS)] = owner.pop(key)
            case 3 if isinstance(owner, dict):
                owner[source.choice(KEYS)] = copy.deepcopy(source.choice(VALUES))
            case 4 if isinstance(owner, list):
                owner.insert(key, copy.deepcopy(owner[key]))
            case _ if isinstance(owner, dict) and owner.keys() & {"role", "from"}:
                owner["role" if "role" in owner else "from"] = source.choice(ROLES)
            case _:
                owner[key] = None
    return row


def texts_of(value: Any) -> list[str]:
    """Return the texts and numbers in a value, those in JSON texts too."""
    if isinstance(value, dict):
        return [text for part in value.values() for text in texts_of(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts_of(part)]
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            inner = None
        return [value, *texts_of(inner)] if isinstance(inner, list | dict) else [value]
    return [json.dumps(value)]


@pytest.mark.parametrize("form", ROWS)
def test_mutated_rows(form: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = random.Random(form)
    rows = [ROWS[form]] + [mutated(ROWS[form], source) for _ in range(COUNT)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    records = open_source(str(path)).records
    assert len(records) == len(rows)
    encode: Any = encode_preferences if form.startswith("preferences") else encode_all
    _, report = encode(records, tokenizer, max_length=300, on_bad_row="skip")
    left_out = report.without_difference + report.empty if encode is encode_preferences else report.without_target
    assert report.rows == len(rows) == report.kept + left_out + report.odd.left_out
    for index, (row, record) in enumerate(zip(rows, records, strict=True)):
        try:
            examples, _ = encode([record], tokenizer, max_length=300)
        except DataError as error:
            starts = ("row 0 (counted from 0): ", "records: expected", "preference pairs: expected")
            assert str(error).startswith(starts), (index, error)  # noqa: PT017
            continue
        if "calls" in form:  # what is learned of calls is the template's writing of them
            continue
        pairs = [(pair.chosen, pair.rejected) for pair in examples] if encode is encode_preferences else [examples]
        for example in (one for pair in pairs for one in pair):
            check_learned(example, row, tokenizer)


def check_learned(example: Any, row: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Nothing is learned that is not a text of the row, apart from ends of answers and the template's white space."""
    texts = [" ".join(text.split()) for text in texts_of(row)]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask.astype(int), [0]])))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        learned = str(tokenizer.decode(example.tokens[start:end])).removesuffix("<|im_end|>")
        learned = " ".join(learned.split()).replace("\ufffd", "")
        assert not learned or any(learned in text for text in texts), (learned, row)


def test_mutated_rows_of_an_encoder_decoder(tokenizer: PreTrainedTokenizerFast) -> None:
    source = random.Random(1)
    rows = [mutated(row, source) for form, row in ROWS.items() if not form.startswith("pref") for _ in range(20)]
    options: dict[str, Any] = {"max_source_length": 50, "max_target_length": 50, "on_bad_row": "skip"}
    _, report = encode_all_seq2seq(rows, tokenizer, **options)
    assert report.rows == len(rows) == report.kept + report.without_target + report.odd.left_out


def test_every_schema_is_mutated() -> None:
    assert {form.partition(",")[0] for form in ROWS} >= set(SCHEMAS)
