"""MMLU's questions: both forms of rows give the same prompts, and faults name their row."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from qlora_jax.data import DataError
from qlora_jax.evaluate import LETTERS, read_questions

SUBJECTS = ("abstract_algebra", "world_history")
ROWS = [
    {
        "subject": SUBJECTS[number % 2],
        "question": f"What is {number} and {number}?\nThink.\n\nNow answer.",
        "choices": [str(2 * number + place) for place in range(4)],
        "answer": number % 4,
    }
    for number in range(12)
]
# The prompt of row 0 with the first example, letter by letter as the authors' evaluation writes it.
ONE_SHOT = """\
The following are multiple choice questions (with answers) about  abstract algebra.

What is 2 and 2?
Think.

Now answer.
A. 4
B. 5
C. 6
D. 7
Answer: C

What is 0 and 0?
Think.

Now answer.
A. 0
B. 1
C. 2
D. 3
Answer:"""


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def examples(tmp_path: Path) -> str:
    return write(tmp_path / "dev.jsonl", ROWS[2:])


def test_prompts_of_questions_with_choices(tmp_path: Path, examples: str) -> None:
    read = read_questions(write(tmp_path / "test.jsonl", ROWS), shots=1, examples=examples)
    assert read.questions[0].prompt() == ONE_SHOT
    assert [question.answer for question in read.questions] == [number % 4 for number in range(12)]
    assert read.questions[1].subject == "world_history"
    assert "about  world history.\n\nWhat is 3 and 3?" in read.questions[1].prompt(), "examples of its own subject"
    assert "12 of 12 questions, 2 subjects, 1-shot" in str(read)


def test_whole_prompts_come_apart_and_together_again(tmp_path: Path, examples: str) -> None:
    built = read_questions(write(tmp_path / "test.jsonl", ROWS), shots=3, examples=examples)
    rows = [{"subject": q.subject, "input": q.prompt(), "output": LETTERS[q.answer]} for q in built.questions]
    other = {"subject": "odd", "input": "Say a letter.\n\nAnswer:", "output": "D"}
    whole = read_questions(write(tmp_path / "five_shot_mmlu_val.json", [*rows, other]))
    assert whole.questions[:-1] == built.questions
    assert whole.questions[-1].prompt() == other["input"]
    assert whole.questions[0].prompt(0) == built.questions[0].prompt(0)
    assert whole.questions[0].prompt(1) == ONE_SHOT


def test_tables(tmp_path: Path) -> None:
    table = Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "test.parquet")
    flat = [
        {"subject": row["subject"], "question": row["question"]}
        | dict(zip(LETTERS, row["choices"], strict=True))
        | {"answer": LETTERS[row["answer"]] if row["answer"] else "0"}
        for row in ROWS
    ]
    Dataset.from_list(flat).to_csv(tmp_path / "test.csv", index=False)
    parquet, csv = (read_questions(str(tmp_path / f"test.{end}"), shots=0).questions for end in ("parquet", "csv"))
    assert parquet == csv
    assert parquet[0].prompt() == ONE_SHOT[: ONE_SHOT.index("What is 2")] + ONE_SHOT[ONE_SHOT.index("What is 0") :]


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, split: str, **options: Any) -> Dataset:
        asked.append((path, split, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load)
    read = read_questions("cais/mmlu")
    assert asked == [("cais/mmlu", "validation", {"name": "all"}), ("cais/mmlu", "dev", {"name": "all"})]
    assert {len(question.examples) for question in read.questions} == {5}
    read_questions("cais/mmlu", split="test", shots=0)
    assert asked[2:] == [("cais/mmlu", "test", {"name": "all"})]


def test_a_sample_is_seeded_and_stated(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", ROWS)
    samples = [read_questions(path, shots=0, limit=5, seed=seed) for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]
    assert "5 of 12 questions (a sample, seed 3)" in str(samples[0])
    whole = read_questions(path, shots=0).questions
    places = [whole.index(question) for question in samples[0].questions]
    assert places == sorted(set(places)), "in their order, each once"
    assert places != list(range(5)), "not the first ones"
    assert read_questions(path, shots=0, limit=100).questions == whole


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"subject": "a", "input": "1?", "output": "E"}, r"row 1 .*, output: expected A, B, C, D or 0 to 3, found 'E'"),
        ({"subject": "a", "question": "1?", "choices": ["1"] * 4, "answer": 4}, r"row 1 .*, answer: .* found 4"),
        ({"subject": "a", "question": "1?", "choices": ["1"] * 3, "answer": 1}, r"row 1 .*: expected four choices"),
        ({"subject": "", "question": "1?", "choices": ["1"] * 4, "answer": 1}, r"row 1 .*: expected a subject, found ''"),
        ({"subject": "a", "question": None, "choices": ["1"] * 4, "answer": 1}, r"row 0 .*: expected a question .* None"),
    ],
)
def test_faults_name_their_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = row | ({"output": "A"} if "input" in row else {"choices": list("1234"), "answer": 1} if "choices" in row else {})
    good["subject"] = "a"
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "test.jsonl", [good, row]), shots=None if "input" in row else 0)


@pytest.mark.parametrize("names", [("question", "answer"), ("subject", "text"), ("subject", "question", "A", "B", "answer")])
def test_other_columns(tmp_path: Path, examples: str, names: tuple[str, ...]) -> None:
    other = write(tmp_path / "other.jsonl", [dict.fromkeys(names, "A")])
    message = rf"other\.jsonl: expected the columns subject, input, output, or .*; found {', '.join(names)}$"
    with pytest.raises(DataError, match=message):
        read_questions(other, shots=0)
    with pytest.raises(DataError, match=message):
        read_questions(examples, shots=1, examples=other)


def test_faults_of_what_is_asked(tmp_path: Path, examples: str) -> None:
    path = write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"test\.jsonl: expected a file of examples for 5-shot prompts, found none"):
        read_questions(path)
    with pytest.raises(DataError, match=r"dev\.jsonl: expected 6 examples of each subject, found 5 of abstract_algebra and"):
        read_questions(path, shots=6, examples=examples)
    with pytest.raises(DataError, match="limit: expected at least 1, found 0"):
        read_questions(path, shots=0, limit=0)
    with pytest.raises(DataError, match="shots: expected at least 0, found -1"):
        read_questions(path, shots=-1)
    whole = write(tmp_path / "whole.jsonl", [{"subject": "a", "input": "Answer:", "output": "A"}])
    with pytest.raises(DataError, match=r"whole\.jsonl: expected no shots and no examples for whole prompts"):
        read_questions(whole, shots=5)
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_questions(str(tmp_path / "missing.jsonl"))


def test_without_shots_whole_prompts_lose_their_examples(tmp_path: Path) -> None:
    header = "The following are multiple choice questions (with answers) about  physics."
    choices = "A. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    prompt = f"{header}\n\nSolved?\n{choices} B\n\nAsked?\n{choices}"
    path = write(tmp_path / "whole.jsonl", [{"subject": "physics", "input": prompt, "output": "C"}])
    assert [one.prompt() for one in read_questions(path).questions] == [prompt]
    assert [one.prompt() for one in read_questions(path, shots=0).questions] == [f"{header}\n\nAsked?\n{choices}"]
