"""The training of the job: it resumes, evaluates, saves, calls the callbacks, and keeps the best state.

precompile_run    starts to compile the run's steps, before the weights are loaded
train_adapter     runs the loop, from the start or from the last checkpoint
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.finetune.folder import start
from qlora_jax.finetune.objectives.objective import Batches, Objective
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.reporting import watch
from qlora_jax.models import ModelSpec
from qlora_jax.nn import brought_to_device, data_mesh, place
from qlora_jax.train import (
    Cadence,
    Callback,
    MetricsLog,
    Precompiled,
    Records,
    Step,
    StepSpec,
    TrainingData,
    TrainState,
    best_evaluation,
    compile_before_run,
    create_state,
    evaluation,
    mean_metrics,
    plot_losses,
    precompile,
    train,
    unchanged_batch,
)
from qlora_jax.train.state_store import StateStore

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainingRun:
    """Everything that training needs and that is known before the weights are loaded.

    Attributes:
        options: the options of the run.
        objective: the data, and how answers and scores are made.
        spec: the training step.
        batches: the batches to train on.
        steps: the number of steps of the whole run.
        learning_rate: the learning rate by step.
        watched: what is looked at during the run.
        say: prints a message.
        progress: whether to show progress bars.
    """

    options: Options
    objective: Objective
    spec: StepSpec[ModelSpec]
    batches: Batches
    steps: int
    learning_rate: optax.Schedule
    watched: watch.Watched
    say: Callable[[str], None]
    progress: bool


def precompile_run(run: TrainingRun) -> Precompiled:
    """Start to compile the steps of a run; no programs where batches have other shapes than the spec says."""
    if run.options.data.streaming or run.options.data.group_by_length:
        return Precompiled()
    return precompile(
        run.spec,
        run.learning_rate,
        evaluate=run.objective.held_out is not None,
        # A run that resumes trains first.
        evaluate_first=not any((run.options.run.output / "checkpoints").glob("[0-9]*")),
        mesh=data_mesh(),
    )


def train_adapter(
    run: TrainingRun, graphdef: Any, adapter: Any, frozen: Any, precompiled: Precompiled
) -> tuple[Any, list[dict[str, Any]]]:
    """Train from the start or from the last checkpoint.

    Args:
        run: the run.
        graphdef, adapter, frozen: the model in parts, as `train.split` returns them.
        precompiled: the programs of the run.

    Returns:
        The trained adapter (with early stopping, that of the lowest held-out loss) and the rows of the log.
    """
    options, spec, output = run.options.run, run.spec, run.options.run.output
    tx = spec.optimizer.build(run.learning_rate)
    state = create_state(tx, adapter, options.seed)
    step = Step(spec.objective, tx, graphdef, _shapes(state), frozen, spec.batch_shapes(jax.device_count()))
    start(run.options)
    train_program, eval_program = precompiled.programs(graphdef)
    with ExitStack() as open_files:
        best = StateStore(output / "best", keep=1) if options.early_stopping_patience else None
        if best is not None:
            open_files.enter_context(closing(best))
        store = open_files.enter_context(closing(StateStore(output / "checkpoints", keep=options.keep)))
        if store.latest_step() is not None:
            state, position = store.restore(state)
            run.batches.set_state(position)
            run.say(f"Resuming {output} after step {int(state.step)} of {run.steps}.")
        log = open_files.enter_context(closing(MetricsLog(output / "metrics.jsonl", resume_at=int(state.step))))
        checkpoints = _Checkpoints(store, best, log)
        checkpoints.save_best(int(state.step), state)

        def save(step: int, state: TrainState, position: dict[str, Any]) -> None:
            checkpoints.save(step, state, position)
            plot_losses(log.rows, output / "loss.png", spec.objective.unit)

        cadence = Cadence(run.steps, options.save_every, options.early_stopping_patience)
        state = train(
            compile_before_run(step.jit_train(), train_program),
            state,
            frozen,
            _training_data(run, step),
            cadence=cadence,
            records=Records(log, run.learning_rate, spec.objective.unit, run.progress),
            save=save,
            callbacks=_callbacks(run, step, compile_before_run(step.jit_eval(), eval_program), log, open_files, state),
        )
        if best is not None and best.latest_step() is not None:
            return brought_to_device(_best_adapter(run, best, state, cadence.exhausted(log.rows))), log.rows
        return brought_to_device(state.adapter), log.rows


@dataclass(frozen=True)
class _Checkpoints:
    """The checkpoints of a run, and with early stopping the best adapter so far beside them."""

    store: StateStore
    best: StateStore | None
    log: MetricsLog

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        self.store.save(step, state, position)
        self.save_best(step, state)

    def save_best(self, step: int, state: TrainState) -> None:
        """Save the adapter if this step is the best and is not saved yet.

        This happens after the checkpoint, so that a run resumes at its best step or later. If the run is killed in between,
        it saves the adapter when it resumes.
        """
        best = self.best
        if best is not None and best_evaluation(self.log.rows)[0] == step and best.latest_step() != step:
            best.save(step, state.adapter, {})


def _shapes(state: TrainState) -> TrainState:
    """Return a state as shapes with its shardings, which do not occupy memory."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _model(step: Step, state: TrainState) -> Any:
    """Return the model with the adapter of a state."""
    return nnx.merge(step.graphdef, brought_to_device(state.adapter), step.frozen)


def _training_data(run: TrainingRun, step: Step) -> TrainingData:
    """Return the batches of the run, and how they become the input of a step."""
    mesh, make = data_mesh(), run.objective.make_batch

    def put(batch: Batch) -> dict[str, jax.Array]:
        return place(mesh, run.spec.micro_batches(batch), P(None, "data"))

    def make_batch(state: TrainState, batch: Batch) -> Batch:
        return batch if make is None else make(_model(step, state), batch)

    return TrainingData(run.batches, put, run.objective.count_tokens, unchanged_batch if make is None else make_batch)


def _callbacks(
    run: TrainingRun, step: Step, eval_step: Callable[..., Any], log: MetricsLog, open_files: ExitStack, state: TrainState
) -> Sequence[Callback]:
    """Return the callbacks of the loop: the evaluation, if data is held out, and what the options ask for."""
    objective, options, mesh = run.objective, run.options.run, data_mesh()

    def put(batch: Batch) -> dict[str, jax.Array]:
        return place(mesh, run.spec.select(batch), P("data"))

    def evaluate(state: TrainState) -> dict[str, float]:
        assert objective.held_out is not None
        batches = objective.held_out(options.batch_size * jax.device_count())
        metrics = mean_metrics(eval_step, state, step.frozen, batches, put=put, progress=run.progress)
        if options.predict_with_generate and objective.score is not None:
            metrics |= objective.score(_model(step, state))
        return metrics

    callbacks = [evaluation(options.eval_every, evaluate)] if objective.held_out is not None else []
    return callbacks + watch.opened(
        run.watched,
        objective.prompts,
        objective.answer,
        lambda state: _model(step, state),
        log,
        resume_at=int(state.step),
        stack=open_files,
    )


def _best_adapter(run: TrainingRun, best: StateStore, state: TrainState, stopped: bool) -> Any:
    """Return the adapter with the lowest held-out loss, and say which step it is from."""
    adapter, _ = best.restore(state.adapter)
    if stopped:
        patience = run.options.run.early_stopping_patience
        run.say(f"Stopped after step {int(state.step)} of {run.steps}: no lower held-out loss in {patience} evaluations.")
    run.say(f"The adapter is that of step {cast(int, best.latest_step())}, which has the lowest held-out loss.")
    return adapter
