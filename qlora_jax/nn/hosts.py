"""Values that several processes share, each of which has only some of the devices (`cluster.py` joins them).

An array on a mesh of several processes has its parts on devices of all of them. A process can make, and read, only the
parts on its own. Every process therefore runs the same programs in the same order, and calls the functions of this module
at the same places:

    put             an array that every process has, onto the devices of all
    to_numpy        an array on the devices of all, to every process
    of_main         what process 0 has read or written, to every process, errors included
    together        errors: a block that fails in one process fails in all
    any_process     a number that is known to some process, such as that of a signal

Process 0 writes all files. With one process, each function is the plain thing that it stands for.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qlora_jax.errors import HostError

__all__ = ["any_process", "check_same", "is_main", "main_bytes", "of_main", "put", "several", "to_numpy", "together"]

T = TypeVar("T")
_TEXT_BYTES = 2048  # of an error that is told to the other processes


def several() -> bool:
    """Return whether the run has several processes."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Return whether this is process 0, which writes all files and messages."""
    return jax.process_index() == 0


def put(value: Any, sharding: Sharding | None) -> Array:
    """Return an array with a sharding, of a value that every process has; no values travel between the processes.

    Args:
        value: an array of the host or of this process's devices, the same in every process; or one on the devices of all.
        sharding: where the result is; None: on the default device.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return value if value.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_numpy(value: Any) -> np.ndarray:
    """Return an array of any devices on the host. If it is split over processes, all of them call this."""
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        assert isinstance(value.sharding, NamedSharding)
        value = put(value, NamedSharding(value.sharding.mesh, PartitionSpec()))
    return np.asarray(jax.device_get(value))


def any_process(number: int | None) -> int | None:
    """Return the largest number that a process calls this with; None if none has any. Numbers are at least 0."""
    if not several():
        return number
    largest = int(np.max(multihost_utils.process_allgather(np.int32(-1 if number is None else number))))
    return None if largest < 0 else largest


@contextmanager
def together() -> Iterator[None]:
    """Leave the block in every process, or in none: an error in one of them is raised in all.

    Raises:
        HostError: another process has failed; this one has not.
    """
    if not several():
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:  # all errors of the package, and of files
        failure = error
    found = _texts_of_all("" if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    number = next((number for number, text in enumerate(found) if text), None)
    if number is not None:
        raise HostError(f"process {number} has stopped: {found[number]}")


def of_main(function: Callable[[], T]) -> T:
    """Return what a function returns in process 0, where alone it is called: a value that JSON can hold.

    Raises:
        HostError: the function has failed; process 0 raises its own error.
    """
    if not several():
        return function()
    data = b""
    with together():
        if is_main():
            data = json.dumps(function()).encode()
    size = any_process(len(data) if is_main() else None)
    assert size is not None
    return json.loads(main_bytes(np.frombuffer(data, np.uint8) if is_main() else np.zeros(size, np.uint8)).tobytes())


def main_bytes(data: np.ndarray) -> np.ndarray:
    """Return the uint8 array that process 0 calls this with; the others give one of the same size."""
    return np.asarray(multihost_utils.broadcast_one_to_all(data)) if several() else data


def check_same(what: str, text: str) -> None:
    """Check that every process calls this with the same text.

    Raises:
        HostError: one has another.
    """
    if not several():
        return
    checksums = _texts_of_all(str(zlib.crc32(text.encode())))
    different = [number for number, checksum in enumerate(checksums) if checksum != checksums[0]]
    if different:
        raise HostError(f"{what}: expected those of process 0 in every process, found others in process {different[0]}")


def _texts_of_all(text: str) -> list[str]:
    """Return the texts of all processes, by their numbers; long ones are cut."""
    own = np.zeros(_TEXT_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    own[: data.size] = data
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(multihost_utils.process_allgather(own))]
