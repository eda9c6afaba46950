"""The programs of a run, compiled while its weights are read.

Their shapes are known before any weight is: those of the abstract model and of the first batch. So the compiler works beside
the loader, and the first step waits for what is left of it. A program is used only for arguments that it was compiled for.
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

from qlora_jax.nn import frozen_sharding
from qlora_jax.nn.parallel import AXIS
from qlora_jax.train.offload import HostOffload
from qlora_jax.train.step import (
    TOKENS,
    LossFunction,
    Transformation,
    Unit,
    init_state,
    jit_eval_step,
    jit_train_step,
    split,
)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Programs on their way.

    Attributes:
        graphdef: of the model that they are for.
        train: the training step.
        evaluate: the evaluation step, which comes first; None where nothing is held out.
    """

    graphdef: Future[Any]
    train: Future[jax.stages.Compiled]
    evaluate: Future[jax.stages.Compiled] | None

    def programs(self, graphdef: Any) -> tuple[Future[jax.stages.Compiled] | None, Future[jax.stages.Compiled] | None]:
        """(training step, evaluation step) of this model; None where they are another's."""
        return (self.train, self.evaluate) if self.graphdef.result() == graphdef else (None, None)


def compile_ahead(
    model: Callable[[], nnx.Module],
    tx: Transformation,
    loss_fn: LossFunction,
    batch: Mapping[str, Any],
    *,
    unit: Unit = TOKENS,
    held_out_loss: LossFunction | None = None,
    mesh: Mesh | None = None,
) -> Ahead | None:
    """Starts to compile, in a thread of its own.

    Args:
        model: makes the abstract model (`nnx.eval_shape`).
        batch: arrays, or shapes, `[micro-batches, b, t]` of all devices.
        held_out_loss: of the evaluation step; None: there is none.
        mesh: devices over which weights and batches are spread; None: one device.

    Returns:
        None where the compiler should have the device for itself, as on a GPU, where it times kernels; and for state in
        host memory, whose place the optimizer itself decides.
    """
    if jax.default_backend() == "gpu" or isinstance(tx, HostOffload):
        return None
    whole = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P())

    def spread(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=frozen_sharding(mesh, leaf.shape))

    def rows(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=None if mesh is None else NamedSharding(mesh, spec))

    def make_parts() -> tuple[Any, Any, Any]:
        with _short_turns():
            graphdef, adapter, frozen = split(model())
            state = jax.eval_shape(partial(init_state, tx), adapter)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state)
        return graphdef, state, jax.tree.map(spread, frozen)

    def compile_step(step: Any, *arguments: Any) -> jax.stages.Compiled:
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            with _short_turns():
                lowered = step.lower(*arguments)
            return lowered.compile()

    def compile_evaluation() -> jax.stages.Compiled:
        assert held_out_loss is not None
        graphdef, state, frozen = parts.result()
        micro_batch = {name: rows(jax.eval_shape(lambda x: x[0], leaf), P(AXIS)) for name, leaf in batch.items()}
        step: Any = jit_eval_step(graphdef, held_out_loss, unit=unit)
        return compile_step(step, state.adapter, frozen, micro_batch)

    def compile_training() -> jax.stages.Compiled:
        graphdef, state, frozen = parts.result()
        micro_batches = {name: rows(leaf, P(None, AXIS)) for name, leaf in batch.items()}
        step: Any = jit_train_step(graphdef, tx, loss_fn, state, unit=unit)
        return compile_step(step, state, frozen, micro_batches)

    threads = ThreadPoolExecutor(1, thread_name_prefix="compile")
    parts = threads.submit(make_parts)
    graphdef = threads.submit(lambda: parts.result()[0])
    evaluate = None if held_out_loss is None else threads.submit(compile_evaluation)
    train = threads.submit(compile_training)
    threads.shutdown(wait=False)
    return Ahead(graphdef, train, evaluate)


@contextmanager
def abandoned_on_error(ahead: Ahead | None) -> Iterator[None]:
    """Where an error ends the wait for programs: none is begun any more, so that the process need not wait to end."""
    try:
        yield
    except BaseException:
        for future in (ahead.evaluate, ahead.train) if ahead is not None else ():
            if future is not None:
                future.cancel()
        raise


@contextmanager
def _short_turns() -> Iterator[None]:
    """Where Python's threads take turns ten times as often.

    Tracing holds the interpreter's lock. The loader gives it up at every tensor, and would wait for its turn each time.
    """
    turn = sys.getswitchinterval()
    sys.setswitchinterval(turn / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
