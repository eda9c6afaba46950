"""Small files of judgements for tests."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """Write rows as lines of JSON; texts as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def score(question: int | str, a: str, b: str, score_a: float, score_b: float) -> dict[str, Any]:
    return {"question_id": question, "model_a": a, "model_b": b, "score_a": score_a, "score_b": score_b}


def verdict(question: int | str, a: str, b: str, verdict: int) -> dict[str, Any]:
    return {"question_id": question, "model_a": a, "model_b": b, "verdict": verdict}


def tournament(seed: int = 0, questions: int = 6, models: Sequence[str] = "abcd") -> list[dict[str, Any]]:
    """Return random verdicts on every ordered pair; the first models are the better ones."""
    draws = np.random.default_rng(seed)
    strength = {name: -0.5 * place for place, name in enumerate(models)}
    rows = []
    for question in range(questions):
        for a in models:
            for b in models:
                if a != b:
                    wins = draws.random() < 1 / (1 + np.exp(strength[b] - strength[a]))
                    rows.append(verdict(question, a, b, 3 if draws.random() < 0.2 else 1 if wins else 2))
    return rows
