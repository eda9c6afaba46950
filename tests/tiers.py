"""The two tiers of a parametrised test: cases that every `python -m pytest` runs, and those of `-m integration`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def tiered(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return all cases, those that are not `quick` marked as integration tests; a tuple is a case of several arguments."""
    cases = list(cases)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"quick cases that are none: {unknown}"
    slow = pytest.mark.integration
    each = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if found in quick else slow) for case, found in zip(each, cases, strict=True)]
