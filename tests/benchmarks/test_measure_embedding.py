"""scripts/benchmarks/measure_embedding.py: the texts it measures on, those that ship among them."""

import json
from pathlib import Path

from scripts.benchmarks.measure_embedding import Arguments, text_of


def test_texts_of_rows_and_of_messages() -> None:
    assert text_of({"question": "How?", "answer": "So.", "id": 3}) == "How?\nSo."
    assert (
        text_of({"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}) == "How?\nSo."
    )


def test_it_needs_no_data_of_the_user() -> None:
    (path,) = Arguments().data
    rows = Path(path).read_text(encoding="utf-8").splitlines()
    assert len(rows) >= Arguments().rows
    assert all(text_of(json.loads(row)) for row in rows)
