"""Some of the malformed requests of fuzz_http.py, which sends as many as one likes. About 2 CPU-seconds."""
# ruff: noqa: E402 - the server's own dependencies may be missing

from pathlib import Path

import pytest

for name in ("starlette", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(name, reason=f"{name}, for the server, is not installed")

from fuzz_http import fuzz


def test_malformed_requests_get_errors_and_leave_nothing_behind(tiny_llama: Path) -> None:
    statuses = fuzz(tiny_llama, 120, 0)
    assert {200, 400, 401, 404} <= statuses.keys()
