"""Streams: the same examples as in memory, one buffer of them at a time, and a position that is exact."""

import json
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from qlora_jax.data import DataError, Example, StreamBatches, batches, stream_records

ROWS, BUFFER, LENGTH = 53, 10, 32


@pytest.fixture(scope="module", params=[".jsonl", ".parquet"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / f"rows{request.param}"
    random = np.random.default_rng(0)
    rows = [{"number": number, "size": int(random.integers(3, LENGTH))} for number in range(ROWS)]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def example(row: dict[str, Any]) -> Example:
    tokens = np.full(row["size"], row["number"] + 1, np.int32)
    return Example(tokens, np.arange(len(tokens)) > 0)


def encode(rows: list[dict[str, Any]], first: int) -> list[Example]:
    assert [row["number"] for row in rows] == list(range(first, first + len(rows)))
    return [example(row) for row in rows]


def stream(file: Path, encode: Callable[..., list[Example]] = encode, **options: Any) -> StreamBatches:
    given = {"buffer": BUFFER, "batch_size": 2, "length": LENGTH, "pad_id": 0, "packing": True, "seed": 3} | options
    return StreamBatches(lambda: stream_records(str(file)), encode, **given)


def documents(source: Any) -> Counter[tuple[int, ...]]:
    """The inputs of each document of the batches."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in source:
        for row, segments in zip(batch["inputs"], batch["segment_ids"], strict=True):
            found.update(tuple(row[segments == segment].tolist()) for segment in range(1, segments.max() + 1))
    return found


def batches_of_a_pass(source: StreamBatches) -> list[dict[str, np.ndarray]]:
    result = []
    while source.get_state()["pass"] == 0:
        result.append(next(source))
    return result[:-1]  # the last one is the first of the next pass


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packing", [True, False])
def test_the_same_examples_as_in_memory(file: Path, packing: bool) -> None:
    examples = [example(row) for row in stream_records(str(file))]
    assert len(examples) == ROWS
    in_memory = list(batches(examples, batch_size=2, length=LENGTH, pad_id=0, packing=packing, epochs=1))
    streamed = batches_of_a_pass(stream(file, packing=packing))
    assert documents(streamed) == documents(in_memory)
    assert len(documents(streamed)) == ROWS
    forms = [{name: (x.shape, x.dtype) for name, x in batch.items()} for batch in (streamed[0], in_memory[0])]
    assert forms[0] == forms[1]


def test_no_more_than_the_buffer_is_held(file: Path) -> None:
    alive: weakref.WeakSet[Example] = weakref.WeakSet()
    asked: list[int] = []
    most = 0

    def counted(rows: list[dict[str, Any]], first: int) -> list[Example]:
        nonlocal most
        asked.append(len(rows))
        assert not alive, "the buffer before is still held"
        made = encode(rows, first)
        for one in made:
            alive.add(one)
        most = max(most, len(alive))
        return made

    source = stream(file, counted)
    for _ in islice(source, 60):
        most = max(most, len(alive))
    assert most == BUFFER
    assert asked[:7] == [10, 10, 10, 10, 10, 3, 10]


@pytest.mark.parametrize("packing", [True, False])
def test_resuming_gives_the_batches_that_would_have_come(file: Path, packing: bool) -> None:
    source, states, expected = stream(file, packing=packing), [], []
    for _ in range(70):  # over several buffers and the end of a pass
        states.append(json.loads(json.dumps(source.get_state())))
        expected.append(next(source))
    assert states[-1]["pass"] >= 1
    for place in [0, 1, *range(2, 70, 5)]:
        again = stream(file, packing=packing)
        again.set_state(states[place])
        assert again.get_state() == states[place]
        for wanted in expected[place : place + 9]:
            assert same(next(again), wanted), place


def test_order_is_decided_by_the_seed_and_differs_between_passes(file: Path) -> None:
    first, again, other = (list(islice(stream(file, seed=seed), 30)) for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))
    source = stream(file, packing=False, buffer=ROWS)
    one, two = ([next(source)["inputs"][:, 0].tolist() for _ in range(27)] for _ in range(2))
    assert one != two
    assert sorted(sum(one, [])) == sorted(sum(two, []))  # noqa: RUF017


def test_rows_that_teach_nothing_are_passed_over(file: Path) -> None:
    def some(rows: list[dict[str, Any]], first: int) -> list[Example]:
        return [] if first in (0, 20, 50) else encode(rows, first)

    source = stream(file, some)
    found = documents(batches_of_a_pass(source))
    assert len(found) == ROWS - 10 - 10 - 3

    def none(rows: list[dict[str, Any]], first: int) -> list[Example]:
        return []

    with pytest.raises(DataError, match="expected at least one row with something to learn, found none in a whole pass"):
        next(stream(file, none))


def test_another_buffer_or_other_data_do_not_go_on(file: Path) -> None:
    source = stream(file)
    next(source)
    state = source.get_state()
    with pytest.raises(ValueError, match="expected a buffer of 10 rows, found 11"):
        stream(file, buffer=11).set_state(state)
    with pytest.raises(ValueError, match="expected the data and options that it was saved with, found seed"):
        stream(file, seed=4).set_state(state)

    def other(rows: list[dict[str, Any]], first: int) -> list[Example]:
        return [example(row | {"number": 7}) for row in rows]

    with pytest.raises(ValueError, match="checksum"):
        stream(file, other).set_state(state)
    with pytest.raises(ValueError, match="buffer: expected at least 1 row, found 0"):
        stream(file, buffer=0)


def test_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"number": 0, "size": 5}\n{"number": 1, "si', encoding="utf-8")
    rows = list(stream_records(str(path)))
    assert rows[0] == {"number": 0, "size": 5}
    assert "line 2, column 15: expected one JSON object a line" in rows[1].reason
    path.with_suffix(".csv").write_text('a,b\n"1,2\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.csv, line 2: expected fields quoted"):
        next(stream(path.with_suffix(".csv")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows.doc", r"rows\.doc: expected one of the extensions \.jsonl, .* found '\.doc'"),
        ("none.jsonl", "expected a data file or a folder, found nothing"),
    ],
)
def test_what_cannot_be_streamed(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "rows.doc").write_text("a,b\n1,2\n")
    with pytest.raises((DataError, FileNotFoundError), match=expected):
        stream_records(str(tmp_path / name))
