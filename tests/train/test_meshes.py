"""Training over data, fsdp and tensor at once, on 8 virtual devices, against one device. About 20 CPU seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MESH = "data=2,fsdp=2,tensor=2"


@pytest.mark.integration
def test_a_mesh_trains_and_answers_as_one_device() -> None:
    """Initial values bit for bit, losses and the adapter to 1e-5, the same tokens; packed weights, a quarter on each device.

    The program compares more meshes, families and steps; docs/meshes.md has its figures.
    """
    command = [sys.executable, "-m", "scripts.studies.meshes", "--steps", "3", "--meshes", MESH, "--decode"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout.splitlines()[-1])["meshes"][MESH]
    assert found["start"]
    assert found["answers"]
    assert found["loss"] < 1e-5
    assert found["adapter"] < 1e-5
    assert found["share"] < 0.26
    assert found["gathered"] == ["u8"]
