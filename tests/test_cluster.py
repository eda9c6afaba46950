"""Joining processes: options, launchers, a coordinator that is not there, and scripts/launch (about 5 CPU-s)."""

import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_jax import commands
from qlora_jax.cli import parse
from qlora_jax.cluster import Cluster, HostOptions, detect
from qlora_jax.errors import OptionError
from qlora_jax.finetune import Options

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM | {"SLURM_NTASKS": "4"}, Cluster("SLURM", 4, 3)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        # `python` in the shell of `salloc --ntasks 4`, whose step has one task.
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # the batch script itself
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Cluster("Open MPI", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}, Cluster("TPUs on GKE", 4)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, Cluster("TPUs on GKE", 6)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),  # as platforms.py sets it
    ],
)
def test_launchers(environment: dict[str, str], expected: Cluster | None) -> None:
    assert detect(environment) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distributed": "off", "process_id": 0}, "distributed: expected on or auto beside process_id, found off"),
        ({"coordinator_address": "host"}, "coordinator_address: expected HOST:PORT, found 'host'"),
        ({"num_processes": 2, "process_id": 2}, "process_id: expected less than num_processes 2, found 2"),
        ({"join_timeout": 0}, "join_timeout: expected at least 1, found 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        HostOptions(**options)


@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_are_not_all_there_end_in_time(number: int) -> None:
    """The first waits for the second in vain; the second finds no coordinator. Port 1 is nobody's."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = "127.0.0.1:1" if number else f"127.0.0.1:{found.getsockname()[1]}"
    program = f"from qlora_jax.cluster import *; join(HostOptions('auto', {address!r}, 2, {number}, join_timeout=1))"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert time.monotonic() - start < 60
    missing = "found nothing that answers there" if number else "of which this is number 0, found some missing"
    assert done.stderr.startswith(f"error: distributed: expected 2 processes at the coordinator {address}")
    assert missing in done.stderr
    assert done.stderr.endswith("within --join-timeout 1 s\n")
    assert done.stderr.count("\n") == 1


def test_other_commands_need_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (SLURM | {"SLURM_NTASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    assert commands.main(["generate", "--prompt", "?"]) == 1
    assert commands.run_script("train_many") == 1
    error = "expected one process, found SLURM with 4 processes; only train runs over several processes\n"
    assert capsys.readouterr().err == f"error: generate: {error}error: train_many: {error}"


def test_shell_files_parse_and_start_the_command() -> None:
    for name in ("tpu_slice.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
        text = (LAUNCH / name).read_text(encoding="utf-8").replace("\\\n", " ")
        [flags] = re.findall(r"python scripts/train\.py ((?:--[a-z-]+ [a-z0-9]+ ?)+)", text)
        [example] = re.findall(r"#     .* (--model .*)$", text, re.MULTILINE)
        arguments = shlex.split(f"{flags} {example}")
        assert parse(Options, description=None, arguments=arguments).hosts.distributed == "on"


def test_the_job_set_starts_one_process_on_each_host() -> None:
    job_set = yaml.safe_load((LAUNCH / "jobset.yaml").read_text(encoding="utf-8"))
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [jobs] = job_set["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(sides[0]) * int(sides[1])
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, script, *arguments = container["command"]
    assert (program, script) == ("python", "scripts/train.py")
    assert parse(Options, description=None, arguments=arguments).hosts.distributed == "on"
