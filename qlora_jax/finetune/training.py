"""The training of the main job, between its folder and the loop: it resumes, evaluates, saves, watches, keeps the best."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
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
from qlora_jax.nn import copy_to_device, data_mesh, put_on_mesh
from qlora_jax.plan.recipe import Recipe, abstract_model
from qlora_jax.train import (
    Ahead,
    Cadence,
    HostOffload,
    MetricsLog,
    Optimizer,
    TrainState,
    best_evaluation,
    compile_ahead,
    compiled_first,
    create_state,
    host_offload,
    jit_eval_step,
    jit_train_step,
    mean_metrics,
    optimizer,
    plot_losses,
    train,
)
from qlora_jax.train.state_store import StateStore


def train_adapter(
    options: Options,
    objective: Objective,
    graphdef: Any,
    adapter: Any,
    frozen: Any,
    source: Batches,
    steps: int,
    tx: Optimizer | HostOffload,
    learning_rate: optax.Schedule,
    ahead: Ahead,
    watched: watch.Watched,
    say: Callable[[str], None],
    *,
    progress: bool,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains from the start or from the last checkpoint.

    Args:
        graphdef, adapter, frozen: the model in parts, as `train.split` gives them.
        steps: of the whole run.
        tx: what updates the adapter, at rates of `learning_rate`.
        ahead: programs on their way.

    Returns:
        The trained adapter (with early stopping, that of the lowest held-out loss) and the rows of the log.
    """
    run = options.run
    state = create_state(tx, adapter, run.seed)
    start(options)
    train_ahead, eval_ahead = ahead.programs(graphdef)
    eval_step = compiled_first(jit_eval_step(graphdef, objective.held_out_loss, unit=objective.unit), eval_ahead)
    mesh = data_mesh()

    def model_of(state: TrainState) -> Any:
        return nnx.merge(graphdef, copy_to_device(state.adapter), frozen)

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_on_mesh(mesh, {name: batch[name] for name in objective.arrays}, P("data"))

    def put_micro_batches(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_on_mesh(mesh, micro_batches(options, objective, batch), P(None, "data"))

    def evaluate(state: TrainState) -> dict[str, float]:
        assert objective.held_out is not None
        batches = objective.held_out(run.batch_size * jax.device_count())
        figures = mean_metrics(eval_step, state, frozen, batches, put=put, progress=progress)
        if run.predict_with_generate and objective.score is not None:
            figures |= objective.score(model_of(state))
        return figures

    def save(step: int, state: TrainState, position: dict[str, Any]) -> None:
        store.save(step, state, position)
        keep_best(step, state)
        plot_losses(log.rows, run.output / "loss.png", objective.unit)

    def keep_best(step: int, state: TrainState) -> None:
        # After the checkpoint, so that a run resumes at its best step or later; if a kill came in between, it is saved then.
        if best is not None and best_evaluation(log.rows)[0] == step and best.latest_step() != step:
            best.save(step, state.adapter, {})

    with ExitStack() as open_files:
        best = None
        if run.early_stopping_patience:
            best = open_files.enter_context(closing(StateStore(run.output / "best", keep=1)))
        store = open_files.enter_context(closing(StateStore(run.output / "checkpoints", keep=run.keep)))
        if store.latest_step() is not None:
            state, position = store.restore(state)
            source.set_state(position)
            say(f"Resuming {run.output} after step {int(state.step)} of {steps}.")
        log = open_files.enter_context(closing(MetricsLog(run.output / "metrics.jsonl", resume_at=int(state.step))))
        keep_best(int(state.step), state)
        watches = watch.opened(
            watched,
            objective.prompts,
            objective.answer,
            model_of,
            log,
            resume_at=int(state.step),
            stack=open_files,
        )
        cadence = Cadence(steps, run.eval_every, run.save_every, run.early_stopping_patience)
        state = train(
            compiled_first(jit_train_step(graphdef, tx, objective.loss, state, unit=objective.unit), train_ahead),
            state,
            frozen,
            source,
            put=put_micro_batches,
            cadence=cadence,
            learning_rate=learning_rate,
            evaluate=None if objective.held_out is None else evaluate,
            save=save,
            log=log,
            count_tokens=objective.count_tokens,
            unit=objective.unit,
            watches=watches,
            progress=progress,
        )
        if best is None or best.latest_step() is None:
            return copy_to_device(state.adapter), log.rows
        adapter, _ = best.restore(state.adapter)
        last, chosen = int(state.step), cast(int, best.latest_step())
        if cadence.exhausted(log.rows):
            say(
                f"Stopped after step {last} of {steps}: no lower held-out loss in {run.early_stopping_patience} evaluations."
            )
        say(f"The adapter is that of step {chosen}, which has the lowest held-out loss.")
        return copy_to_device(adapter), log.rows


def started_ahead(
    options: Options,
    objective: Objective,
    recipe: Recipe,
    tx: Optimizer | HostOffload,
    source: Batches,
) -> Ahead:
    """The run's programs, on their way; none where the first batch is not known yet, or stands for no other."""
    if options.data.streaming or options.data.group_by_length:
        return Ahead()
    position = source.get_state()
    batch = micro_batches(options, objective, next(source))
    source.set_state(position)
    return compile_ahead(
        partial(abstract_model, recipe, jax.default_backend()),
        tx,
        objective.loss,
        batch,
        unit=objective.unit,
        held_out_loss=None if objective.held_out is None else objective.held_out_loss,
        evaluate_first=not any((options.run.output / "checkpoints").glob("[0-9]*")),  # a run that goes on trains first
        mesh=data_mesh(),
    )


def micro_batches(options: Options, objective: Objective, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the loss reads of a batch `[rows, t]`, as `[micro-batches, b, t]`."""
    count = options.run.accumulation_steps
    return {name: batch[name].reshape(count, -1, batch[name].shape[-1]) for name in objective.arrays}


def make_optimizer(options: Options, learning_rate: optax.Schedule) -> Optimizer | HostOffload:
    """That of the options, with its state where they put it."""
    chosen = options.optimizer
    tx = optimizer(
        chosen.optimizer,
        learning_rate,
        beta1=chosen.beta1,
        beta2=chosen.beta2,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm or None,
        loraplus_lr_ratio=chosen.loraplus_lr_ratio,
    )
    offloaded = chosen.host_offload or chosen.host_adapter
    return host_offload(tx, adapter=chosen.host_adapter) if offloaded else tx
