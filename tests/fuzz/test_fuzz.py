"""Some mutations of fuzz.py, which says what has to hold: about 25 s of processor time. `pytest` runs none of it by default.

The fast tests of the readers are beside them: tests/models/test_bounds.py, tests/data/test_mutated_rows.py and those of the
formats in tests/checkpoint.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="processes are watched through Linux's /proc")
def test_damaged_files_end_in_one_clear_error_or_a_value() -> None:
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(script), "--mutations", "300", "--seed", str(os.getpid())]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
