"""Compile the steps of a run while its weights are read.

The shapes of a step follow from its `StepSpec`, and are known before any weight is. The compiler therefore works in a
thread beside the loader, and the first step waits only for the rest of the compilation. A compiled program is used only for
arguments of the shapes and shardings that it was compiled for. For other arguments, the step is compiled when it is called.
"""

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from qlora_jax.nn.parallel import rows_spec
from qlora_jax.train.placement import place_step
from qlora_jax.train.spec import Step, StepSpec, build_step

_Program = Future[jax.stages.Compiled]
_SWITCH_INTERVAL = sys.getswitchinterval()


@dataclasses.dataclass(frozen=True)
class Precompiled:
    """The programs of a run, which may still be compiling; each is None if it is not compiled in advance.

    Attributes:
        step: the step of shapes that the programs are for.
        train: the training step.
        evaluate: the evaluation step.
    """

    step: Future[Step] | None = None
    train: _Program | None = None
    evaluate: _Program | None = None

    def programs(self, graphdef: Any) -> tuple[_Program | None, _Program | None]:
        """Return (training step, evaluation step) for a model of this graph; None for both if they are for another graph."""
        if self.step is None or self.step.result().graphdef == graphdef:
            return self.train, self.evaluate
        self.close()
        return None, None

    def close(self) -> None:
        """Cancel the programs that have not begun to compile. One that has cannot be stopped: the process waits for it."""
        for future in (self.train, self.evaluate):
            if future is not None:
                future.cancel()


def precompile(
    spec: StepSpec[Any],
    learning_rate: optax.Schedule,
    *,
    evaluate: bool = False,
    evaluate_first: bool = True,
    mesh: Mesh | None = None,
    loss_limit: bool = False,
) -> Precompiled:
    """Start to compile a run's steps in a thread, and return the programs to come.

    JAX's scoped settings, such as `jax.default_matmul_precision`, do not reach that thread. Nothing is compiled on a GPU,
    where the compiler times kernels and needs the device for itself, nor for state in host memory, whose sharding the
    optimizer itself decides.

    Args:
        spec: describes the step.
        learning_rate: the learning rate by step.
        evaluate: whether to compile the evaluation step too.
        evaluate_first: whether the evaluation step is needed before the training step.
        mesh: the devices over which weights and batches are spread; None: one device.
        loss_limit: whether the training step is given a limit of the loss.
    """
    if jax.default_backend() == "gpu" or spec.optimizer.host_optimizer:
        return Precompiled()

    def build() -> Step:
        with _short_turns():
            step = build_step(spec, learning_rate, devices=1 if mesh is None else mesh.size)
        return place_step(step, mesh)

    def compile_program(function: Any, *arguments: Any) -> jax.stages.Compiled:
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            with _short_turns():
                lowered = function.lower(*arguments)
            return lowered.compile()

    def compile_evaluation() -> jax.stages.Compiled:
        step = future.result()
        sharding = None if mesh is None else NamedSharding(mesh, rows_spec())
        micro_batch = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in step.micro_batch.items()
        }
        return compile_program(step.jit_eval(), step.state.adapter, step.frozen, micro_batch)

    def compile_training() -> jax.stages.Compiled:
        step = future.result()
        limit = [jax.ShapeDtypeStruct((), jnp.float32)] if loss_limit else []
        return compile_program(step.jit_train(), step.state, step.frozen, step.batch, *limit)

    threads = ThreadPoolExecutor(1, thread_name_prefix="compile")
    future = threads.submit(build)
    train = None if evaluate_first and evaluate else threads.submit(compile_training)
    evaluation = threads.submit(compile_evaluation) if evaluate else None
    train = threads.submit(compile_training) if train is None else train
    threads.shutdown(wait=False)
    return Precompiled(future, train, evaluation)


def compile_before_run(
    step: Callable[..., Any],
    precompiled: _Program | None = None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[..., Any]:
    """Return a function that compiles a jitted step before it runs it on a batch, its third argument, of new shapes.

    So the compiler and the program do not need the machine's memory at the same time. A compiler frees some hundred
    megabytes, which the C library would hold; they are returned to the system in between.

    Args:
        step: the jitted step.
        precompiled: the same step, compiled in advance for arguments of the first shapes; None if it is not.
        around: is entered while the step is compiled, or while a precompiled one is waited for.
    """
    programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[2]))
        if shapes not in programs:
            with around():
                programs[shapes] = _program(step, None if programs else precompiled, arguments)
            if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # only glibc has it
                trim(0)
        return programs[shapes](*arguments)

    return call


def _program(step: Any, precompiled: _Program | None, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """Return the function that runs the step: the compiled program, or the step itself, whose own cache has it by then."""
    if precompiled is not None and _fits(compiled := precompiled.result(), arguments):
        return compiled
    step.lower(*arguments).compile()
    return step


def _fits(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> bool:
    """Return whether a program was compiled for arguments of these shapes and shardings."""
    expected, tree = jax.tree.flatten(compiled.args_info[0])
    # The sharding of an argument that the program does not read is None.
    shardings = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda sharding: sharding is None)

    def has_sharding(leaf: Any, sharding: jax.sharding.Sharding | None) -> bool:
        if sharding is None or not isinstance(leaf, Array) or not leaf.committed:
            return True
        return leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    return tree == jax.tree.structure(arguments) and all(
        (info.shape, info.dtype) == (leaf.shape, leaf.dtype) and has_sharding(leaf, sharding)
        for info, sharding, leaf in zip(expected, shardings, jax.tree.leaves(arguments), strict=True)
    )


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let Python's threads take turns ten times as often as when this module was imported.

    Tracing holds the interpreter's lock. The loader releases it at every tensor, and would wait for its turn each time.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(_SWITCH_INTERVAL)
