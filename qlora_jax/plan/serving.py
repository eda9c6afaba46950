"""The memory of a serving engine: its device programs (`serve.programs`), compiled without the device.

    prefill   a chunk of one prompt, in a text as long as the cache has room for
    decode    one token for each row, whose texts are as long
    sample    one draw for each row; the model is in memory beside it

What stays on the device between them is the model, the bank of adapters, the keys and values of all rows, and what sampling
needs of each row: its logits, the tokens in its text and its biases. The cache has room for a chunk more than a text has
tokens, as in `serve.device`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.errors import UnsupportedError
from qlora_jax.models import DecoderConfig, ModelSpec
from qlora_jax.nn.parallel import frozen_shapes
from qlora_jax.peft.bank import Bank, split_bank
from qlora_jax.plan.compile import Program, compile_program, place, versions
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.topology import context, machine_mesh
from qlora_jax.plan.tree_bytes import tree_bytes, weight_bytes
from qlora_jax.serve import programs
from qlora_jax.serve.programs import Chunk, Tokens, empty_state
from qlora_jax.serve.row_sampling import Draws, RowSettings, all_allowed
from qlora_jax.train.spec import StepSpec

__all__ = ["ServeSizes", "ServingPlan", "compile_serving"]


@dataclasses.dataclass(frozen=True)
class ServeSizes:
    """The sizes of an engine, beside the number of its rows.

    Attributes:
        tenants: adapters on the device; 0: the bare base, without a bank.
        rank: the largest rank of an adapter.
        capacity: the most tokens of a prompt and its answer.
        chunk: tokens of a prompt that are processed at a time.
    """

    tenants: int = 0
    rank: int = 16
    capacity: int = 2048
    chunk: int = 128

    def slots(self, rows: int) -> int:
        """Return the slots of the bank that a server with so many rows makes, slot 0 for the bare base among them."""
        return max(self.tenants, rows) + 1


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """The memory of an engine on a device, in bytes.

    Attributes:
        machine: the machine.
        rows: the rows of the engine.
        sizes: its other sizes.
        packed_weights, dense_weights: the frozen weights; see `compile.Plan`.
        bank: A and B of all slots, slot 0 for the bare base among them, with their scalings.
        cache: the keys and values of all rows.
        sampling: the logits, and what sampling remembers of each row's text.
        prefill, decode, sample: the compiled programs.
        versions: the versions of jax, jaxlib and the compiler's package.
    """

    machine: Machine
    rows: int
    sizes: ServeSizes
    packed_weights: int
    dense_weights: int
    bank: int
    cache: int
    sampling: int
    prefill: Program
    decode: Program
    sample: Program
    versions: dict[str, str]

    @property
    def peak(self) -> int:
        """The bytes of device memory in the largest program, with what lies beside it."""
        return self.largest.peak + self._beside(self.largest)

    @property
    def largest(self) -> Program:
        """The program during which the peak is reached."""
        return max(self.prefill, self.decode, self.sample, key=lambda program: program.peak + self._beside(program))

    @property
    def programs(self) -> dict[str, Program]:
        """The programs by name."""
        return {"prefill": self.prefill, "decode": self.decode, "sample": self.sample}

    def _beside(self, program: Program) -> int:
        """Return the bytes that are in memory beside a program's own: those of the model, if it is none of its arguments."""
        return self.packed_weights + self.dense_weights + self.bank if program is self.sample else 0


def compile_serving(spec: StepSpec[ModelSpec], machine: Machine, sizes: ServeSizes) -> ServingPlan:
    """Compile the programs of a serving engine for a machine; see `compile_train_step` for further errors.

    Args:
        spec: describes the model; its batch size is the number of rows. The bank holds adapters of all linear layers.
        machine: one device, which need not be attached.
        sizes: the sizes of the engine.

    Raises:
        UnsupportedError: several devices, or an encoder-decoder.
    """
    if machine.count > 1 or not isinstance(spec.model.config, DecoderConfig):
        found = f"{machine.count} devices" if machine.count > 1 else type(spec.model.config).__name__
        raise UnsupportedError(f"serve: expected a decoder-only model on one device, found {found}")
    mesh, rows, vocabulary = machine_mesh(machine), spec.batch.batch_size, spec.model.config.vocab_size
    model: Any = dataclasses.replace(spec.model, method=_method(spec.model, sizes, rows)).abstract(machine.device.target)
    graphdef, bank, frozen = split_bank(model)
    bank, frozen = place(bank, mesh, P()), frozen_shapes(mesh, frozen)
    capacity = sizes.capacity + sizes.chunk
    state, device = nnx.merge_state(bank, frozen), jax.eval_shape(lambda: empty_state(model, rows, capacity, vocabulary))
    device = place(device, mesh, P())
    fixed = {"reach": capacity, "banked": sizes.tenants > 0}
    one, ids = np.zeros(1, np.int32), np.zeros(rows, np.int32)
    tokens = np.zeros((1, sizes.chunk), np.int32)
    draws = Draws(ids, ids, all_allowed(rows, vocabulary))
    settings = RowSettings.of([None] * rows, vocabulary)
    chunk, each = place(Chunk(tokens, tokens, one, one, one), mesh, P()), place(Tokens(ids, ids, ids), mesh, P())
    with context(mesh):
        prefill = _Bound(programs.prefill_chunk, graphdef, {"capacity": capacity, **fixed})
        decode = _Bound(programs.decode_rows, graphdef, fixed)
        compiled = {
            "prefill": compile_program(prefill, (state, device, chunk), machine),
            "decode": compile_program(decode, (state, device, each), machine),
            "sample": compile_program(
                programs.sample_rows, (device, place(settings, mesh, P()), place(draws, mesh, P())), machine
            ),
        }
    packed, dense = weight_bytes(frozen)
    return ServingPlan(
        machine=machine,
        rows=rows,
        sizes=sizes,
        packed_weights=packed,
        dense_weights=dense,
        bank=tree_bytes(bank),
        cache=tree_bytes(device.cache),
        sampling=tree_bytes((device.logits, device.memory)),
        **compiled,
        versions=versions(machine),
    )


def _method(model: ModelSpec, sizes: ServeSizes, rows: int) -> Bank | None:
    return Bank(sizes.slots(rows), sizes.rank, jnp.dtype(model.dtype)) if sizes.tenants else None


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A program of the engine with its graph and its static arguments, which can be traced like a jitted function."""

    program: Any
    graphdef: nnx.GraphDef[Any]
    fixed: dict[str, Any]

    def trace(self, *arguments: object) -> jax.stages.Traced:
        return self.program.trace(self.graphdef, *arguments, **self.fixed)
