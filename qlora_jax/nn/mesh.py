"""The mesh of devices: its axes, its shape, and the context in which programs use it.

    data      the rows of the batch are split; the weights are whole
    fsdp      the rows of the batch are split, and the stored weights too: a layer gathers its own while it runs
    tensor    the matrices are split inside a layer, by their roles (`nn.roles`): heads, features of the feed-forward

The rows of a batch are therefore split over `data` and `fsdp`, the stored weights over `fsdp` and `tensor`. A mesh always
has all three axes, in this order, so that the devices of a tensor axis are neighbours; an axis of size 1 changes nothing.
"""

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from qlora_jax.errors import OptionError
from qlora_jax.quant.targets import tensor_shards

__all__ = [
    "AXES",
    "FSDP",
    "ROWS",
    "TENSOR",
    "MeshShape",
    "check_axes",
    "context_mesh",
    "data_mesh",
    "devices_of_context",
    "mesh_context",
    "row_shards",
    "shape_on",
    "tensor_shards",
    "weight_shards",
]

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
ROWS = (DATA, FSDP)  # the axes over which the rows of a batch are split


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """The number of devices along each axis of a mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sizes in the order of `AXES`."""
        return self.data, self.fsdp, self.tensor

    @property
    def row_shards(self) -> int:
        """The number of parts into which the rows of a batch are split."""
        return self.data * self.fsdp

    @property
    def weight_shards(self) -> int:
        """The number of parts into which the stored weights are split."""
        return self.fsdp * self.tensor

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Return the shape that a text such as "data=2,fsdp=2,tensor=2" describes; an axis that it does not name has size 1.

        Raises:
            OptionError: an unknown axis, an axis named twice, or a size that is not a whole number above 0.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (word.strip() for word in part.partition("="))
            if axis not in AXES:
                raise OptionError(f"mesh {text!r}: expected axes among {', '.join(AXES)}, found {axis!r}")
            if axis in sizes:
                raise OptionError(f"mesh {text!r}: expected each axis once, found {axis} twice")
            if not size.isascii() or not size.isdecimal() or int(size) < 1:
                raise OptionError(f"mesh {text!r}: expected {axis}=N with a whole number N above 0, found {part.strip()!r}")
            sizes[axis] = int(size)
        return cls(**sizes)


def shape_on(shape: MeshShape | None, devices: int) -> MeshShape:
    """Return the shape of a mesh of so many devices; None: all of them along `fsdp`.

    Raises:
        OptionError: the shape has another number of devices.
    """
    if shape is None:
        return MeshShape(fsdp=devices)
    if shape.size != devices:
        product = " x ".join(map(str, shape.sizes))
        raise OptionError(f"mesh {shape}: expected as many devices as there are, {devices}, found {product} = {shape.size}")
    return shape


def data_mesh(shape: MeshShape | None = None) -> Mesh | None:
    """Return a mesh of all devices, or None if there is only one device.

    Args:
        shape: the number of devices along each axis; None: all of them along `fsdp`.

    Raises:
        OptionError: the shape has another number of devices.
    """
    devices = jax.devices()
    sizes = shape_on(shape, len(devices)).sizes
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)) if len(devices) > 1 else None


def mesh_context(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Return a context in which the mesh is JAX's current one; without a mesh nothing changes."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_axes(mesh: Mesh) -> None:
    """Check that a mesh has the axes that weights are split over.

    Raises:
        OptionError: it has others.
    """
    if mesh.axis_names != AXES:
        found = ", ".join(map(str, mesh.axis_names))
        raise OptionError(f"mesh: expected the axes {', '.join(AXES)} (as nn.data_mesh has), found {found}")


def context_mesh() -> Mesh | None:
    """Return the mesh of the context, or None if there is none."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()


def devices_of_context() -> int:
    """Return the number of devices of the context's mesh; 1 without a mesh, and inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else mesh.size


def weight_shards() -> int:
    """Return the number of parts into which the context's mesh splits stored weights; 1 inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.manual_axes else math.prod(mesh.shape.get(axis, 1) for axis in (FSDP, TENSOR))


def row_shards() -> int:
    """Return the number of parts into which the context's mesh splits the rows of a batch; 1 inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.manual_axes else math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
