"""Many adapters with secrets of their own, served to many clients at once by a whole server; about 20 CPU-seconds."""

import json

import pytest

from scripts.studies import serve_secrets


@pytest.mark.integration
def test_every_client_gets_the_secret_of_its_own_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer slots than adapters; nothing is compiled, and clients that leave in a stream give back their rows."""
    sizes = {"adapters": 40, "slots": 8, "rows": 4, "clients": 60, "seconds": 0, "kills": 10}
    line = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    assert serve_secrets.main(line) == 0, capsys.readouterr()
    tally = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tally["correct"] == tally["requests"] == 60 + 16
    assert (tally["wrong"], tally["compiled"], tally["rows_running"]) == ([], 0, [0, 0])
    assert tally["killed"] > 0
