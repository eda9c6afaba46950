"""Which rows a run trains on, and which are held out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data import DataError, Example, Template, open_source
from qlora_jax.finetune import DataOptions, Options, RunOptions
from qlora_jax.finetune.objectives.corpus import Corpus, read_corpus, read_source

ROWS = 40


@dataclass
class Account:
    templates: dict[Template, int] = field(default_factory=lambda: {"plain": ROWS})

    def check_bad_rows(self) -> None:
        pass


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(ROWS)), encoding="utf-8")
    return str(path)


def read(rows: str | tuple[str, ...], **fields: Any) -> Corpus[int]:
    def encode(records: Any) -> tuple[list[int], Account]:
        return [int(record["text"]) for record in records], Account()

    def shown(number: int) -> tuple[Example, ...]:
        raise AssertionError(number)

    options = Options(data=DataOptions(data=rows, **fields), run=RunOptions(seed=3))
    return read_corpus(options, None, encode, shown)  # type: ignore[arg-type]


def test_a_share_or_a_number_of_rows_is_held_out(rows: str) -> None:
    share, number = read(rows, held_out=0.25), read(rows, held_out=10)
    assert len(share.held_out) == 10
    assert sorted(share.training + share.held_out) == list(range(ROWS))
    assert (share.training, share.held_out) == (number.training, number.held_out)
    assert len(read(rows, held_out=1).held_out) == 1
    assert read(rows, held_out=0).held_out == []


def test_at_most_so_many_of_both(rows: str) -> None:
    whole, few = read(rows, held_out=10), read(rows, held_out=10, max_train_samples=5, max_eval_samples=2)
    assert len(few.training) == 5
    assert few.training == [number for number in whole.training if number in few.training], "in the order of the data"
    assert few.training != whole.training[:5]
    assert few.training == read(rows, held_out=10, max_train_samples=5).training, "the seed decides"
    assert few.held_out == whole.held_out[:2]
    given = read(rows, eval_data=rows, max_train_samples=ROWS, max_eval_samples=3)
    assert (given.training, given.held_out) == (list(range(ROWS)), [0, 1, 2])


def test_a_sample_has_a_share_of_each_source(rows: str, tmp_path: Path) -> None:
    second = tmp_path / "second.jsonl"
    second.write_text("".join(f'{{"text": "{ROWS + number}"}}\n' for number in range(ROWS)), encoding="utf-8")
    training = read((rows, str(second)), held_out=0, max_train_samples=30).training
    assert 10 <= sum(number < ROWS for number in training) <= 20
    weighted = read((rows, str(second)), held_out=0, max_train_samples=30, weights=(9, 1)).training
    assert sum(number < ROWS for number in weighted) == 27
    assert set(weighted) <= set(training)
    with pytest.raises(ValueError, match="max_train_samples 1: expected with weights an example of each source"):
        read((rows, str(second)), held_out=0, max_train_samples=1, weights=(1, 1))


def test_a_bad_row_is_named_with_its_source(rows: str) -> None:
    def encode(records: Any) -> tuple[list[int], Account]:
        raise DataError("row 0 (counted from 0): bad")

    with pytest.raises(DataError, match=rf"^{rows}, row 0 \(counted from 0\): bad$") as error:
        read_source(rows, open_source(rows), encode)
    assert isinstance(error.value.__cause__, DataError)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"held_out": 40}, r"--held-out 40: leaves nothing to train on of 40 examples"),
        ({"held_out": 1.5}, r"held_out: expected a share from 0 to below 1 or a whole number, found 1\.5"),
        ({"held_out": -1}, r"held_out: expected a share .*, found -1"),
        ({"held_out": float("inf")}, r"held_out: expected a share .*, found inf"),
        ({"max_train_samples": 0}, r"max_train_samples: expected at least 1, found 0"),
        ({"max_eval_samples": -2}, r"max_eval_samples: expected at least 1, found -2"),
    ],
)
def test_numbers_that_mean_nothing(rows: str, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read(rows, **fields)


def test_the_rows_of_a_conversation_are_held_out_together(rows: str) -> None:
    """Every tenth number is a conversation of three rows; the others are single rows, whose split does not depend on it."""

    def encode(records: Any) -> tuple[list[tuple[int, int]], Account]:
        numbers = [int(record["text"]) for record in records]
        return [(number, part) for number in numbers for part in range(1 if number % 10 else 3)], Account()

    def split(held_out: float, *sources: str) -> Corpus[tuple[int, int]]:
        options = Options(data=DataOptions(data=sources, held_out=held_out), run=RunOptions(seed=3))
        conversation = lambda row: None if row[0] % 10 else row[0]  # noqa: E731
        return read_corpus(options, None, encode, lambda row: (), conversation)  # type: ignore[arg-type]

    for held_out in (1, 7, 20, ROWS - 1):
        whole = split(held_out, rows)
        numbers = sorted({number for number, _ in whole.held_out})
        assert numbers == sorted(read(rows, held_out=held_out).held_out)
        assert not {number for number, _ in whole.training} & set(numbers)
        assert len(whole.training) + len(whole.held_out) == ROWS + 8
        assert whole.training == sorted(whole.training)
        assert whole.held_out == sorted(whole.held_out)
    twice = split(0.5, rows, rows)
    assert (
        len({number for number, _ in twice.held_out}) > len(twice.held_out) / 3
    )  # each source has conversations of its own
    assert len(twice.training) + len(twice.held_out) == 2 * (ROWS + 8)
    with pytest.raises(ValueError, match=r"--held-out 40: leaves nothing to train on of 40 examples"):
        split(40, rows)
