"""Some kills of kills.py, which says what has to hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.integration
def test_a_killed_process_leaves_the_whole_result_or_none() -> None:
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, str(script), "--kills", "4", "--seed", str(os.getpid())]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
