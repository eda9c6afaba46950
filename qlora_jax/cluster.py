"""Joining several processes into one run, with JAX's own runtime (`jax.distributed`).

A run over several hosts is the same command on each of them. One process is the coordinator, number 0, and the others
connect to it. Where a launcher has started the processes, its environment variables say so:

    SLURM (srun)              SLURM_NTASKS, SLURM_PROCID, SLURM_STEP_NODELIST …
    Open MPI (mpirun)         OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK
    TPUs on GKE               TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, MEGASCALE_NUM_SLICES
    Kubernetes, indexed jobs  JOB_COMPLETION_INDEX, with the package `kubernetes`
    TPU VMs                   the metadata server of the machine

`detect` looks at them to decide whether there is anything to join; the addresses and numbers are found by
`jax.distributed.initialize`. Nothing here touches a device, and JAX is imported only when there are processes to join.

No process waits for ever. A process that is not joined by all others within `join_timeout` seconds ends with one line. If a
process ends later, the others end with the next program that all of them compute, or at the latest `heartbeat_timeout`
seconds after its last sign of life, by JAX's runtime. A process that has failed leaves at once (`run_joined`), without the
barrier at which JAX's processes wait for each other as they end.
"""

import dataclasses
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NoReturn

from qlora_jax.errors import OptionError

__all__ = ["Cluster", "HostOptions", "detect", "join", "run_joined"]

_METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_SIGNALS = 128  # exit codes from here on are those of signals
_LONGER = 60  # seconds by which JAX waits longer than `join_timeout`, so that the line is always ours


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """The processes of a run over several hosts, as `jax.distributed.initialize` takes them."""

    distributed: Literal["auto", "on", "off"] = "auto"
    """Join other processes: if the options below or a launcher (TPU VM, GKE, SLURM, Open MPI) say so, always, or never."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, which all processes can reach; found by JAX if a launcher has started the processes."""
    num_processes: int | None = None
    """Number of processes; found by JAX if a launcher has started them."""
    process_id: int | None = None
    """Number of this process, from 0; found by JAX if a launcher has started it."""
    join_timeout: int = 300
    """Seconds within which all processes have to join; after that each ends with an error."""
    heartbeat_timeout: int = 100
    """Seconds after which a process that gives no sign of life counts as dead, and all others end."""

    def __post_init__(self) -> None:
        given, problems = self._given(), []
        if self.distributed == "off" and given:
            problems.append(f"distributed: expected on or auto beside {', '.join(given)}, found off")
        if self.coordinator_address is not None and not re.fullmatch(r".+:\d{1,5}", self.coordinator_address):
            problems.append(f"coordinator_address: expected HOST:PORT, found {self.coordinator_address!r}")
        least = {"num_processes": 1, "process_id": 0, "join_timeout": 1, "heartbeat_timeout": 2}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                problems.append(f"{name}: expected at least {bound}, found {value}")
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            problems.append(f"process_id: expected less than num_processes {self.num_processes}, found {self.process_id}")
        if problems:
            raise OptionError("; ".join(problems))

    def _given(self) -> list[str]:
        """Return the names of the options that say which processes there are."""
        return [name for name in ("coordinator_address", "num_processes", "process_id") if getattr(self, name) is not None]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The launcher that has started this process with others.

    Attributes:
        launcher: its name.
        processes: the number of processes; None if JAX asks for it elsewhere.
        process_id: the number of this process, likewise.
    """

    launcher: str
    processes: int | None = None
    process_id: int | None = None

    def __str__(self) -> str:
        return self.launcher if self.processes is None else f"{self.launcher} with {self.processes} processes"


def detect(environment: Mapping[str, str] | None = None) -> Cluster | None:
    """Return the launcher that has started several processes, of which this is one; None: there is none.

    Args:
        environment: the environment variables; those of this process if None.
    """
    given = os.environ if environment is None else environment
    if all(name in given for name in _SLURM):
        tasks = _number(given.get("SLURM_STEP_NUM_TASKS", given["SLURM_NTASKS"]))
        return Cluster("SLURM", tasks, _number(given["SLURM_PROCID"])) if tasks > 1 else None
    if "OMPI_COMM_WORLD_SIZE" in given:
        size = _number(given["OMPI_COMM_WORLD_SIZE"])
        return Cluster("Open MPI", size, _number(given.get("OMPI_COMM_WORLD_RANK", ""))) if size > 1 else None
    workers = given.get("TPU_PROCESS_ADDRESSES", given.get("TPU_WORKER_HOSTNAMES", ""))
    slices = max(_number(given.get("MEGASCALE_NUM_SLICES", "1")), 1)
    if workers:
        count = slices * len(workers.split(","))
        return Cluster("TPUs on GKE", count) if count > 1 else None
    if {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= given.keys() and importlib.util.find_spec("kubernetes"):
        return Cluster("Kubernetes")
    if environment is None and "TPU_SKIP_MDS_QUERY" not in given and _tpu_is_attached():
        count = slices * _workers_of_tpu_vm(given.get("GCE_METADATA_IP", "metadata.google.internal"))
        return Cluster("a TPU slice", count) if count > 1 else None
    return None


def _number(text: str) -> int:
    """Return a whole number of an environment variable; 0 for anything else."""
    return int(text) if text.isascii() and text.isdecimal() else 0


def _tpu_is_attached() -> bool:
    devices = Path("/dev")
    found = any(any(devices.glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    return found and not any(devices.glob("nvidia[0-9]*")) and importlib.util.find_spec("libtpu") is not None


def _workers_of_tpu_vm(server: str) -> int:
    """Return the number of hosts of a TPU slice, by the metadata server of this one; 1 if it does not say."""
    request = urllib.request.Request(_METADATA.format(server), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return len(answer.read().decode().split(","))
    except (OSError, ValueError):
        return 1


def join(options: HostOptions) -> None:
    """Join the other processes of the run, if there are any; before anything touches a device.

    Raises:
        OptionError: processes that the options do not describe completely, or a coordinator that cannot be used.
    """
    if options.distributed == "off":
        return
    cluster, given = detect(), options._given()
    if cluster is None and options.distributed == "auto" and not given:
        return
    if cluster is None and len(given) < 3 and (given or options.distributed == "on"):
        raise OptionError(
            "distributed: expected coordinator_address, num_processes and process_id, or a launcher that JAX knows (TPU VM, "
            f"GKE, SLURM, Open MPI), found {', '.join(given) or 'none of them'}"
        )
    import jax

    if jax.distributed.is_initialized():  # by the program that uses the package as a library
        return
    # Its handler of SIGTERM would replace ours. The processes agree on the step at which they stop in the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _deadline(options, cluster):
            jax.distributed.initialize(
                options.coordinator_address,
                options.num_processes if options.num_processes or cluster is None else cluster.processes,
                options.process_id if options.process_id is not None or cluster is None else cluster.process_id,
                cluster_detection_method="deactivate" if cluster is None else None,
                initialization_timeout=options.join_timeout + _LONGER,
                heartbeat_timeout_seconds=options.heartbeat_timeout,
                shutdown_timeout_seconds=options.heartbeat_timeout,
            )
    except (RuntimeError, ValueError) as error:
        where = options.coordinator_address or cluster
        raise OptionError(f"distributed: cannot join at {where}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _deadline(options: HostOptions, cluster: Cluster | None) -> Iterator[None]:
    """End the process with one line if the block takes longer than `join_timeout`. JAX would abort with a stack dump."""
    joined = threading.Event()

    def watch() -> None:
        if not joined.wait(options.join_timeout):
            line = f"error: distributed: {_missing(options, cluster)} within --join-timeout {options.join_timeout} s\n"
            os.write(2, line.encode())
            os._exit(1)

    threading.Thread(target=watch, name="join", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _missing(options: HostOptions, cluster: Cluster | None) -> str:
    """Return in words what is missing for all processes to be joined."""
    address = options.coordinator_address
    if address is None:
        return f"expected all processes of {cluster}, found some missing"
    everyone = f"expected {options.num_processes or 'all'} processes at the coordinator {address}"
    if options.process_id == 0:
        return f"{everyone}, of which this is number 0, found some missing"
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        return f"{everyone}, found nothing that answers there ({error})"
    return f"{everyone}, found some missing, or another program at that address"


def run_joined(command: Callable[[], int]) -> int:
    """Return the exit code of a command; after an error in one of several processes, end this process at once with it.

    JAX's processes wait for each other as they end. One that has failed would wait for others that wait for it. After a
    signal all of them have stopped at the same step, and end together.
    """
    try:
        code = command()
    except Exception:
        if not _is_joined():
            raise
        traceback.print_exc()
        code = 1
    if 0 < code < _SIGNALS and _is_joined():
        _leave(code)
    return code


def _is_joined() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _leave(code: int) -> NoReturn:
    """End this process; the coordinator waits a second, since the others, which may have the same news, end without it."""
    import jax

    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(1)
    os._exit(code)
