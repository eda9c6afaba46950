"""The QLoRA authors' data sets by name: from rows with the columns of the hub to the very text that their program learns.

The reference is written anew here after their program's description: what it makes of a row (`input`, `output`), and how its
collator joins, cuts and masks them.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import NAMED, DataError, encode, encode_all, load_records, open_source

FLAT = "### Human: Hi### Assistant: Hello.### Human: Bye### Assistant: Good day."
HH = "\n\nHuman: Is it late?\n\nAssistant: It is."
ALPACA_HEAD = "Below is an instruction that describes a task"
ALPACA_TASK = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd."
# Name → a row as the hub has it, the authors' input and output, the arguments of load_dataset.
CASES: dict[str, tuple[dict[str, Any], str, str, dict[str, str]]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "2, 3", "output": "5", "text": "…"},
        f"{ALPACA_HEAD}, paired with an input that provides further context. {ALPACA_TASK}"
        "\n\n### Input:\n2, 3\n\n### Response: ",
        "5",
        {"path": "tatsu-lab/alpaca"},
    ),
    "alpaca-clean": (
        {"instruction": "Add.", "input": "", "output": "What?"},
        f"{ALPACA_HEAD}. {ALPACA_TASK}\n\n### Response: ",
        "What?",
        {"path": "yahma/alpaca-cleaned"},
    ),
    "chip2": (
        {"text": "<human>: Why?\n<bot>: So.\nAnd so.", "metadata": "{}"},
        "Why?",
        "So.\nAnd so.",
        {"path": "laion/OIG", "data_files": "unified_chip2.jsonl"},
    ),
    "self-instruct": (
        {"prompt": "Task: add.\nOutput:", "completion": " 5<|endoftext|>"},
        "Task: add.\nOutput:",
        " 5<|endoftext|>",
        {"path": "yizhongw/self_instruct", "name": "self_instruct"},
    ),
    "hh-rlhf": ({"chosen": HH, "rejected": HH + "!"}, "", HH, {"path": "Anthropic/hh-rlhf"}),
    "oasst1": ({"text": FLAT}, "", FLAT, {"path": "timdettmers/openassistant-guanaco"}),
    "longform": (
        {"input": "Write.", "output": "A text.", "source": "C4", "subset": "c4"},
        "Write.",
        "A text.",
        {"path": "akoksal/LongForm"},
    ),
    "flan": (
        {"inputs": "Is it so?\nOPTIONS: yes, no", "targets": "yes", "task": "boolq"},
        "Is it so?\nOPTIONS: yes, no",
        "yes",
        {"path": "SirNeural/flan_v2"},
    ),
}


def collated(
    tokenizer: Any, source: str, target: str, source_max_len: int, target_max_len: int
) -> tuple[list[int], list[bool]]:
    """Tokens and mask as the authors' collator has them: each part with its special token, cut at its right end."""
    before = tokenizer((tokenizer.bos_token or "") + source, add_special_tokens=False)["input_ids"][:source_max_len]
    after = tokenizer(target + tokenizer.eos_token, add_special_tokens=False)["input_ids"][:target_max_len]
    return before + after, [False] * len(before) + [True] * len(after)


def as_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Puts `rows` where the hub would be; returns the list of what is asked of it."""
    asked = []

    def load(path: str, **options: str) -> datasets.Dataset:
        asked.append({"path": path, **options})
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_cases_are_all_names() -> None:
    assert CASES.keys() == NAMED.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_learned_as_their_program_learns_it(
    name: str, inst: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, source, target, hub = CASES[name]
    asked = as_hub(monkeypatch, [row])
    records = open_source(name).records
    assert asked == [hub | {"split": "train"}]
    # This tokenizer has a chat template and a token before every text: the named sets keep their own form.
    (example,), _ = encode_all(records, inst, max_length=1000, progress=False)
    tokens, mask = collated(inst, source, target, 1000, 1000)
    assert example.tokens.tolist() == tokens
    assert example.loss_mask.tolist() == mask


def test_a_split_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = as_hub(monkeypatch, [{"text": FLAT}])
    assert open_source("oasst1", "test").note == "timdettmers/openassistant-guanaco, as the QLoRA authors' program reads it"
    assert asked[0]["split"] == "test"


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("oasst1").mkdir()
    (tmp_path / "oasst1" / "train.jsonl").write_text('{"question": "Q", "answer": "A"}\n')
    assert list(open_source("oasst1").records) == [{"question": "Q", "answer": "A"}]


def test_rows_that_are_not_of_that_set(monkeypatch: pytest.MonkeyPatch) -> None:
    as_hub(monkeypatch, [{"text": "<human>: Q\n<bot>: A"}, {"text": "Q and A"}])
    with pytest.raises(DataError, match=r"chip2, row 1 \(counted from 0\): column 'text': expected '\\n<bot>: ' before"):
        open_source("chip2")
    with pytest.raises(DataError, match=r"longform, row 0 .*: column 'input': expected text, found null"):
        open_source("longform")


@pytest.mark.parametrize("name", ["unnatural-instructions", "vicuna"])
def test_names_without_a_source_say_why(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: expected a data set that can be read; .*(never reads|not released)"):
        open_source(name)


WORDS = "one two three four five six seven eight nine ten " * 3


@pytest.mark.parametrize("source_max", [1, 5, 16, 400])
@pytest.mark.parametrize("target_max", [2, 7, 40, 400])
def test_limits_are_their_collator_s(inst: PreTrainedTokenizerFast, source_max: int, target_max: int) -> None:
    rows = [
        {"prompt": WORDS, "completion": WORDS},
        {"prompt": "Why?", "completion": WORDS},
        {"prompt": WORDS, "completion": "So."},
        {"completion": WORDS},
    ]
    examples, report = encode_all(
        rows, inst, max_length=1000, source_max_length=source_max, target_max_length=target_max, progress=False
    )
    cut = 0
    for row, example in zip(rows, examples, strict=True):
        tokens, mask = collated(inst, row.get("prompt", ""), row["completion"], source_max, target_max)
        cut += tokens != collated(inst, row.get("prompt", ""), row["completion"], 1000, 1000)[0]
        assert example.tokens.tolist() == tokens
        assert example.loss_mask.tolist() == mask
    assert report.truncated == cut


def test_limits_of_a_conversation(chatml: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one two three four"}] * 2
    whole = encode({"messages": turns}, chatml)
    first = int(np.flatnonzero(whole.loss_mask)[0])
    for target in range(3, len(whole) - first + 3):
        (example,), _ = encode_all([{"messages": turns}], chatml, max_length=1000, target_max_length=target, progress=False)
        assert len(example) <= first + target
        np.testing.assert_array_equal(example.tokens, whole.tokens[: len(example)])
        # It ends in an answer, with its end where that fits.
        end = whole.tokens[len(example) - 1] == chatml.eos_token_id
        assert example.loss_mask[-1] or len(example) == len(whole)
        assert end or len(example) >= min(first + target, len(whole))


def test_limits_and_long_rows(chatml: PreTrainedTokenizerFast) -> None:
    rows = [{"completion": "Short."}, {"completion": WORDS}]
    options: dict[str, Any] = {"max_length": 500, "target_max_length": 20, "progress": False}
    examples, report = encode_all(rows, chatml, on_long="drop", **options)
    assert (len(examples), report.dropped_long) == (1, 1)
    with pytest.raises(DataError, match=r"row 1 .*at most 500 tokens, 20 tokens from the answer on, found"):
        encode_all(rows, chatml, on_long="error", **options)
    for wrong in (
        {"source_max_length": 0},
        {"source_max_length": 500},
        {"target_max_length": 1},
        {"target_max_length": 501},
    ):
        with pytest.raises(DataError, match=rf"{next(iter(wrong))}: expected (less than|at least|at most)"):
            encode_all(rows, chatml, **{**options, **wrong})


def test_real_rows_of_guanaco(inst: PreTrainedTokenizerFast, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_records(str(shared_data / "oasst_guanaco.jsonl"), "train[:100]").to_list()
    as_hub(monkeypatch, rows)
    # Guanaco's limits: source 16, target 512.
    examples, _ = encode_all(
        open_source("oasst1").records, inst, max_length=528, source_max_length=16, target_max_length=512, progress=False
    )
    # As the recipes read a file of that form.
    from_file, _ = encode_all(rows, inst, max_length=513, train_on_source=True, progress=False)
    for row, example, same in zip(rows, examples, from_file, strict=True):
        tokens, mask = collated(inst, "", row["text"], 16, 512)
        assert example.tokens.tolist() == same.tokens.tolist() == tokens
        assert example.loss_mask.tolist() == same.loss_mask.tolist() == mask
