"""The third stage of a run: what was trained is saved, measured and shown."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.adapters.bind import adapter_tensors, load_adapter
from qlora_jax.finetune.folder import complete, replace_file
from qlora_jax.finetune.objectives.answers import show_answers
from qlora_jax.finetune.reporting import mmlu
from qlora_jax.finetune.reporting.card import Card, write_card
from qlora_jax.finetune.reporting.hub import upload
from qlora_jax.finetune.saving import folder_of, save_trained
from qlora_jax.finetune.training import TrainedRun
from qlora_jax.models import Model
from qlora_jax.nn import data_mesh, is_main, mesh_context, of_main, several, together
from qlora_jax.train import TOKENS, Unit, perplexity, without_adapter

__all__ = ["finish"]

_logger = logging.getLogger(__name__)


def finish(trained: TrainedRun) -> Path:
    """Save what was trained, with its metrics, and return the folder of the adapter, or of the model.

    Raises:
        CheckpointError: files that cannot be written.
        ConnectionError: the adapter was saved, and not uploaded.
    """
    with trained.prepared.goodput.phase("finishing"), mesh_context(data_mesh(trained.prepared.spec.mesh)):
        if several():
            return _finish_several(trained)
        rows = _measure(trained)
        folder = _save(trained, rows)
        _log_mmlu(trained, rows)
        _show_answers(trained)
    _publish(trained, folder)
    return folder


def _finish_several(trained: TrainedRun) -> Path:
    """Let process 0 save, while the others give their parts of what is split over processes. Nothing is generated."""
    folder = folder_of(trained.prepared)
    with together():
        if is_main():
            _save(trained, _measure(trained))
        else:
            adapter_tensors(trained.model)  # as process 0 does to save them
    if trained.prepared.objective.prompts or trained.prepared.objective.score is not None:
        _logger.info("No answers are generated in a run of several processes; generate.py does so with the adapter.")
    of_main(lambda: _publish(trained, folder))
    return folder


def _publish(trained: TrainedRun, folder: Path) -> None:
    """Upload what was saved, if that is asked for, mark the run as finished, and say where its time went."""
    options, goodput = trained.prepared.options, trained.prepared.goodput
    if options.watch.push_to_hub:
        _logger.info("Uploaded the adapter: %s", upload(folder, options.watch.push_to_hub))
    complete(options)
    if goodput.is_kept:  # a tenant's time is no time of its own
        goodput.write()
        _logger.info("%s.", goodput.describe())


def _save(trained: TrainedRun, rows: list[dict[str, Any]]) -> Path:
    """Write the adapter or the model with its card, and return its folder."""
    trained.picture.draw(trained.rows)
    run = trained.prepared
    card = Card(
        options=run.options,
        config=run.pretrained.checkpoint.model_config,
        method=run.method,
        metadata=run.adapter_metadata,
        rows=rows,
        chosen_step=trained.chosen_step,
        unit=run.spec.objective.unit,
    )
    folder = save_trained(trained, partial(write_card, card=card))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    _logger.info("Saved the %s (%.1f MiB): %s", "model" if run.method.is_full else "adapter", size, folder)
    return folder


def _measure(trained: TrainedRun) -> list[dict[str, Any]]:
    """Write eval_results.json, and return the rows of the run with everything that was measured of the saved adapter."""
    run, rows = trained.prepared, trained.rows
    options, objective = run.options.run, run.objective
    evaluated = [row for row in rows if "eval_loss" in row]
    if objective.held_out is None or not evaluated:  # none where metrics.jsonl was lost
        return rows
    before, after = _held_out_metrics(evaluated, best=options.early_stopping_patience > 0)
    if objective.score is not None and not options.predict_with_generate and not several():
        after |= {f"eval_{name}": value for name, value in objective.score(trained.model).items()}
    replace_file(options.output / "eval_results.json", json.dumps(after, indent=2) + "\n")
    _logger.info("%s", _compare(before, after, run.spec.objective.unit))
    return [row | after if row["step"] == trained.chosen_step else row for row in rows]


def _log_mmlu(trained: TrainedRun, rows: list[dict[str, Any]]) -> None:
    run = trained.prepared
    questions = run.questions
    if questions is not None:

        def ask() -> dict[str, float]:
            return mmlu.measure(trained.model, questions, run.options, progress=run.progress)

        _logger.info("%s", mmlu.describe(rows, trained.chosen_step, ask))


def _show_answers(trained: TrainedRun) -> None:
    """Print the answers to held-out prompts before and after training."""
    run = trained.prepared
    if run.objective.prompts:
        before, objective = _untrained(trained), run.objective
        show_answers(before, trained.model, objective.prompts, objective.answer, run.pretrained.tokenizer)
    elif run.objective.held_out is not None and run.options.run.samples:
        _logger.info("No answers are shown: in the held-out examples nothing comes before what is learned.")


def _untrained(trained: TrainedRun) -> Model:
    """Return the model before training."""
    if trained.initial_adapter is None and trained.model.prompt is not None:
        return without_adapter(trained.model)  # virtual tokens of zeros are tokens nevertheless
    base = nnx.merge(trained.graphdef, jax.tree.map(jnp.zeros_like, trained.adapter), trained.frozen)
    return base if trained.initial_adapter is None else load_adapter(base, trained.initial_adapter)


def _held_out_metrics(evaluated: Sequence[dict[str, Any]], *, best: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the held-out metrics before training, and those of the adapter: of the lowest loss if `best`, else the last.

    Those before training are empty where their row was lost.
    """
    trained = [row for row in evaluated if row["step"] > 0] or evaluated
    after = min(trained, key=lambda row: row["eval_loss"]) if best else trained[-1]
    first = evaluated[0] if evaluated[0]["step"] == 0 else {}
    before, after = ({k: v for k, v in row.items() if k.startswith(("step", "eval_"))} for row in (first, after))
    return before, after


def _compare(before: dict[str, Any], after: dict[str, Any], unit: Unit) -> str:
    """Return the held-out metrics before and after in words."""
    lines = []
    for name in (name for name in after if name.startswith("eval_")):
        start = f"{before[name]:.3f} before, " if name in before else ""
        line = f"Held-out {name.removeprefix('eval_')} {start}{after[name]:.3f} after"
        if name == "eval_loss" and unit == TOKENS:
            start = f"{perplexity(before[name]):.1f} and " if name in before else ""
            line += f" (perplexity {start}{perplexity(after[name]):.1f})"
        lines.append(f"{line}.")
    return "\n".join(lines)
