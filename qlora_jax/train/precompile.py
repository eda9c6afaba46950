"""The programs of a run, compiled while its weights are read.

Their shapes are known before any weight is: those of the abstract model and of the first batch. So the compiler works beside
the loader, and the first step waits for what is left of it. A program is used only for arguments that it was compiled for;
others are compiled where they are needed.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.nn.parallel import AXIS, frozen_shapes
from qlora_jax.train.offload import HostOffload
from qlora_jax.train.step import TOKENS, LossFunction, Transformation, Unit, init_state, jit_eval_step, jit_train_step, split

_Program = Future[jax.stages.Compiled]
_TURN = sys.getswitchinterval()


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Programs on their way; all None: there are none.

    Attributes:
        parts: (graphdef, state, frozen) of the model that they are for, as shapes.
        train: the training step.
        evaluate: the evaluation step; None where nothing is held out.
    """

    parts: Future[tuple[Any, Any, Any]] | None = None
    train: _Program | None = None
    evaluate: _Program | None = None

    def programs(self, graphdef: Any) -> tuple[_Program | None, _Program | None]:
        """(training step, evaluation step) of this model; None where they are another's."""
        if self.parts is None or self.parts.result()[0] == graphdef:
            return self.train, self.evaluate
        self.close()
        return None, None

    def close(self) -> None:
        """Begins no further program. One that is being compiled cannot be stopped, and the process waits for it to end."""
        for future in (self.train, self.evaluate):
            if future is not None:
                future.cancel()


def compile_ahead(
    model: Callable[[], nnx.Module],
    tx: Transformation,
    loss_fn: LossFunction,
    batch: Mapping[str, Any],
    *,
    unit: Unit = TOKENS,
    held_out_loss: LossFunction | None = None,
    evaluate_first: bool = True,
    mesh: Mesh | None = None,
) -> Ahead:
    """Starts to compile, in a thread of its own, which JAX's scoped settings (`jax.default_matmul_precision`, say) do not
    reach.

    Args:
        model: makes the abstract model (`nnx.eval_shape`).
        batch: arrays, or shapes, `[micro-batches, b, t]` of all devices.
        held_out_loss: of the evaluation step; None: there is none.
        evaluate_first: which of the two is needed first.
        mesh: devices over which weights and batches are spread; None: one device.

    Returns:
        No programs where the compiler should have the device for itself, as on a GPU, where it times kernels; and for state
        in host memory, whose place the optimizer itself decides.
    """
    if jax.default_backend() == "gpu" or isinstance(tx, HostOffload):
        return Ahead()
    whole = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P())

    def rows(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=None if mesh is None else NamedSharding(mesh, spec))

    def make_parts() -> tuple[Any, Any, Any]:
        with _short_turns():
            graphdef, adapter, frozen = split(model())
            state = jax.eval_shape(partial(init_state, tx), adapter)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state)
        return graphdef, state, frozen_shapes(mesh, frozen)

    def compile_step(step: Any, *arguments: Any) -> jax.stages.Compiled:
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            with _short_turns():
                lowered = step.lower(*arguments)
            return lowered.compile()

    def compile_evaluation() -> jax.stages.Compiled:
        assert held_out_loss is not None
        graphdef, state, frozen = parts.result()
        micro_batch = {name: rows(jax.eval_shape(lambda x: x[0], leaf), P(AXIS)) for name, leaf in batch.items()}
        return compile_step(jit_eval_step(graphdef, held_out_loss, unit=unit), state.adapter, frozen, micro_batch)

    def compile_training() -> jax.stages.Compiled:
        graphdef, state, frozen = parts.result()
        micro_batches = {name: rows(leaf, P(None, AXIS)) for name, leaf in batch.items()}
        return compile_step(jit_train_step(graphdef, tx, loss_fn, state, unit=unit), state, frozen, micro_batches)

    threads = ThreadPoolExecutor(1, thread_name_prefix="compile")
    parts = threads.submit(make_parts)
    train = None if evaluate_first and held_out_loss is not None else threads.submit(compile_training)
    evaluate = None if held_out_loss is None else threads.submit(compile_evaluation)
    train = threads.submit(compile_training) if train is None else train
    threads.shutdown(wait=False)
    return Ahead(parts, train, evaluate)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Where Python's threads take turns ten times as often as when this module was imported.

    Tracing holds the interpreter's lock. The loader gives it up at every tensor, and would wait for its turn each time.
    """
    sys.setswitchinterval(_TURN / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(_TURN)
