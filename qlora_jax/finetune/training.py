"""The second stage of a run: the weights are read and the adapter is trained, from the start or from the last checkpoint."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from qlora_jax.adapters.files import Adapter
from qlora_jax.finetune.folder import CHECKPOINTS, GOODPUT, start
from qlora_jax.finetune.initial_model import load_initial_model
from qlora_jax.finetune.prepare import PreparedRun
from qlora_jax.finetune.reporting.callbacks import reporting_callbacks
from qlora_jax.finetune.reporting.picture import LossPicture
from qlora_jax.models import Model
from qlora_jax.nn import AttentionTarget, copy_to_device, data_mesh, is_main, mesh_context, of_main, put_rows
from qlora_jax.peft import Subtracted
from qlora_jax.train import (
    Cadence,
    Callback,
    MetricsLog,
    Precompiled,
    Records,
    Step,
    TrainingData,
    TrainState,
    best_evaluation,
    compile_before_run,
    create_state,
    evaluation,
    mean_metrics,
    precompile,
    split,
)
from qlora_jax.train import train as train_loop
from qlora_jax.train.shared_store import SharedStore, open_store
from qlora_jax.train.state_store import StateStore, latest_step

__all__ = ["TrainedRun", "train"]

Batch = dict[str, np.ndarray]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedRun:
    """What training leaves in memory.

    Attributes:
        prepared: the run.
        graphdef, adapter, frozen: the trained model in parts, as `train.split` returns them.
        rows: the rows of metrics.jsonl.
        last_step: the last step.
        picture: the drawing of the losses.
        initial_adapter: the adapter before training, where the base alone is another function; None: the base alone.
        subtracted: what was subtracted from the weights of the base before these were stored; None: nothing.
    """

    prepared: PreparedRun
    graphdef: Any
    adapter: Any
    frozen: Any
    rows: list[dict[str, Any]]
    last_step: int
    picture: LossPicture
    initial_adapter: Adapter | None
    subtracted: Subtracted | None

    @property
    def model(self) -> Model:
        """The trained model."""
        return nnx.merge(self.graphdef, self.adapter, self.frozen)

    @property
    def chosen_step(self) -> int:
        """The step whose adapter is saved: that of the lowest held-out loss with early stopping, else the last one."""
        patience = self.prepared.options.run.early_stopping_patience
        return (best_evaluation(self.rows)[0] if patience else None) or self.last_step


def train(run: PreparedRun) -> TrainedRun:
    """Read the weights and train.

    The output folder becomes this run's: with `overwrite` the files of the run before are deleted.

    Raises:
        CheckpointError: weights that are NaN or infinite.
        DivergedError: the loss or the gradient is not finite.
        OSError: files that cannot be written.
        Interrupted: after Ctrl-C or SIGTERM, once the step is done and saved.
    """
    with closing(_precompile(run)) as precompiled:
        with run.goodput.phase("loading"):
            model, initial_adapter, subtracted = load_initial_model(run)
        graphdef, adapter, frozen = split(run.spec.objective.prepare(model))
        del model
        _logger.info("%s", _describe(run, adapter, frozen))
        with mesh_context(data_mesh(run.spec.mesh)):
            picture = LossPicture(run.options.run.output / "loss.png", run.spec.objective.unit)
            adapter, rows, last = _train_adapter(run, (graphdef, adapter, frozen), precompiled, picture)
    return TrainedRun(run, graphdef, adapter, frozen, rows, last, picture, initial_adapter, subtracted)


@dataclass(frozen=True)
class _Traced:
    """A model that was traced already, as `StepSpec.model`."""

    model: Model
    residuals_on_host: bool

    def abstract(self, platform: str | AttentionTarget | None = None) -> Model:
        return self.model


def _precompile(run: PreparedRun) -> Precompiled:
    """Start to compile the steps of the run; nothing is compiled where batches have other shapes than the spec says."""
    if run.options.data.streaming or run.options.data.group_by_length:
        return Precompiled()
    return precompile(
        dataclasses.replace(run.spec, model=_Traced(run.pretrained.abstract, run.spec.model.residuals_on_host)),  # pyright: ignore[reportArgumentType]
        run.learning_rate,
        evaluate=run.objective.held_out is not None,
        # A run that resumes trains first.
        evaluate_first=of_main(lambda: latest_step(run.options.run.output / CHECKPOINTS) is None),
        mesh=data_mesh(run.spec.mesh),
        loss_limit=run.options.health.on_bad_step == "skip",
    )


def _describe(run: PreparedRun, adapter: Any, frozen: Any) -> str:
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))
    devices = jax.devices()
    return (
        f"{trainable:,} trainable parameters; frozen weights {weights / 2**20:,.0f} MiB; {run.steps} steps of "
        f"{run.options.run.rows_of_step(len(devices))} × {run.objective.row} on {len(devices)} {devices[0].device_kind}"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + (f" ({run.spec.mesh})" if run.spec.mesh is not None else "")
    )


def _train_adapter(
    run: PreparedRun, parts: tuple[Any, Any, Any], precompiled: Precompiled, picture: LossPicture
) -> tuple[Any, list[dict[str, Any]], int]:
    """Run the loop, from the start or from the last checkpoint.

    Args:
        run: the run.
        parts: the model as (graphdef, adapter, frozen), as `train.split` returns them.
        precompiled: the programs of the run.
        picture: the drawing of the losses.

    Returns:
        The trained adapter (with early stopping, that of the lowest held-out loss), the rows of the log, and the last step.
    """
    graphdef, adapter, frozen = parts
    options, spec, output = run.options.run, run.spec, run.options.run.output
    tx = spec.optimizer.build(run.learning_rate)
    state = create_state(tx, adapter, options.seed)
    batch, compiler_options = spec.batch_shapes(jax.device_count()), spec.compiler_options()
    step = Step(spec.objective, tx, graphdef, _shapes(state), frozen, batch, compiler_options)
    of_main(lambda: start(run.options, run.objective.held_out_checksum))
    train_program, eval_program = precompiled.programs(graphdef)
    with ExitStack() as open_files:
        best = open_store(output / "best", keep=1) if options.early_stopping_patience else None
        if best is not None:
            open_files.enter_context(closing(best))
        store = open_files.enter_context(closing(open_store(output / CHECKPOINTS, keep=options.keep)))
        if store.latest_step() is not None:
            state, position = store.restore(state)
            if run.batches.get_state() != position:  # `prepare` has moved them there
                run.batches.set_state(position)
            _logger.info("Resuming %s after step %d of %d.", output, int(state.step), run.steps)
        log = open_files.enter_context(closing(MetricsLog(output / "metrics.jsonl", resume_at=int(state.step))))
        run.goodput.open(output / GOODPUT if is_main() else None, log.reached)
        monitor = open_files.enter_context(closing(run.options.health.monitor(output, run.goodput)))
        checkpoints = _Checkpoints(store, best, log, picture, step.state)
        checkpoints.save_best(int(state.step), state)
        cadence = Cadence(run.steps, options.save_every, options.early_stopping_patience, run.options.health.policy())
        state = train_loop(
            compile_before_run(step.jit_train(), train_program, monitor.compiling),
            state,
            frozen,
            _training_data(run, step),
            cadence=cadence,
            records=Records(log, run.learning_rate, spec.objective.unit, run.progress, monitor),
            checkpoints=checkpoints,
            callbacks=[
                *_evaluation(run, step, compile_before_run(step.jit_eval(), eval_program, monitor.compiling)),
                *reporting_callbacks(
                    run, lambda state: _model(step, state), log, resume_at=int(state.step), open_files=open_files
                ),
            ],
        )
        adapter = state.adapter
        if best is not None and best.latest_step() is not None:
            adapter = _best_adapter(run, best, state, cadence.exhausted(log.rows))
        return copy_to_device(adapter), log.rows, int(state.step)


@dataclass(frozen=True)
class _Checkpoints:
    """The checkpoints of a run, with early stopping the best adapter so far beside them, and the picture of the losses."""

    store: StateStore | SharedStore
    best: StateStore | SharedStore | None
    log: MetricsLog
    picture: LossPicture
    like: TrainState

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        self.store.save(step, state, position)
        self.save_best(step, state)
        if is_main():
            self.picture.draw_now_and_then(self.log.rows)

    def wait(self) -> None:
        self.store.wait()

    def restore(self) -> TrainState:
        return self.store.restore(self.like)[0]

    def save_best(self, step: int, state: TrainState) -> None:
        """Save the adapter if this step is the best and is not saved yet.

        This happens after the checkpoint is complete, so that a run resumes at its best step or later. If the run is killed
        in between, it saves the adapter when it resumes.
        """
        best = self.best
        if best is not None and best_evaluation(self.log.rows)[0] == step and best.latest_step() != step:
            self.store.wait()
            best.save(step, state.adapter, {})
            best.wait()


def _shapes(state: TrainState) -> TrainState:
    """Return a state as shapes with its shardings, which do not occupy memory."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _model(step: Step, state: TrainState) -> Any:
    """Return the model with the adapter of a state."""
    return nnx.merge(step.graphdef, copy_to_device(state.adapter), step.frozen)


def _training_data(run: PreparedRun, step: Step) -> TrainingData:
    """Return the batches of the run, and how they become the input of a step."""
    mesh, make = data_mesh(run.spec.mesh), run.objective.make_batch

    def put(batch: Batch) -> dict[str, jax.Array]:
        return put_rows(mesh, run.spec.micro_batches(batch), 1)

    if make is None:
        return TrainingData(run.batches, put, run.objective.count_tokens)

    def make_batch(state: TrainState, batch: Batch) -> Batch:
        return make(_model(step, state), batch)

    return TrainingData(run.batches, put, run.objective.count_tokens, make_batch)


def _evaluation(run: PreparedRun, step: Step, eval_step: Callable[..., Any]) -> Sequence[Callback]:
    """Return the callback that evaluates the held-out data; none if nothing is held out."""
    objective, options, mesh = run.objective, run.options.run, data_mesh(run.spec.mesh)
    held_out = objective.held_out
    if held_out is None:
        return ()

    def put(batch: Batch) -> dict[str, jax.Array]:
        return put_rows(mesh, run.spec.select(batch))

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = held_out(options.micro_batch_rows(jax.device_count()))
        metrics = mean_metrics(eval_step, state, step.frozen, batches, put=put, progress=run.progress)
        if options.predict_with_generate and objective.score is not None:
            metrics |= objective.score(_model(step, state))
        return metrics

    return (evaluation(options.eval_every, evaluate),)


def _best_adapter(run: PreparedRun, best: StateStore | SharedStore, state: TrainState, stopped: bool) -> Any:
    """Return the adapter with the lowest held-out loss, and say which step it is from."""
    adapter, _ = best.restore(state.adapter)
    if stopped:
        _logger.info(
            "Stopped after step %d of %d: no lower held-out loss in %d evaluations.",
            int(state.step),
            run.steps,
            run.options.run.early_stopping_patience,
        )
    _logger.info("The adapter is that of step %d, which has the lowest held-out loss.", cast(int, best.latest_step()))
    return adapter
