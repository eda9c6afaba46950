"""The third stage of a run: what was trained is saved, measured and shown."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.adapters.bind import load_adapter
from qlora_jax.checkpoint.tokenizer import save_tokenizer
from qlora_jax.finetune.folder import complete
from qlora_jax.finetune.objectives.answers import show_answers
from qlora_jax.finetune.reporting import mmlu
from qlora_jax.finetune.reporting.card import Card, write_card
from qlora_jax.finetune.reporting.hub import upload
from qlora_jax.finetune.saving import save_trained
from qlora_jax.finetune.training import TrainedRun
from qlora_jax.models import Model
from qlora_jax.nn import data_mesh, mesh_context
from qlora_jax.train import TOKENS, Unit, perplexity, plot_losses, without_adapter

__all__ = ["finish"]

_logger = logging.getLogger(__name__)


def finish(trained: TrainedRun) -> Path:
    """Save what was trained, with its metrics, and return the folder of the adapter, or of the model.

    Raises:
        CheckpointError: files that cannot be written.
        ConnectionError: the adapter was saved, and not uploaded.
    """
    options = trained.prepared.options
    with mesh_context(data_mesh()):
        folder = _save(trained)
        rows = _measure(trained)
        _write_card(trained, folder, rows)
        _log_mmlu(trained, rows)
        _show_answers(trained)
    if options.watch.push_to_hub:
        _logger.info("Uploaded the adapter: %s", upload(folder, options.watch.push_to_hub))
    complete(options)
    return folder


def _save(trained: TrainedRun) -> Path:
    """Write the adapter with its metadata, or the model, and return its folder."""
    run, output = trained.prepared, trained.prepared.options.run.output
    pretrained, method = run.pretrained, run.method
    plot_losses(trained.rows, output / "loss.png", run.spec.objective.unit)
    folder = save_trained(trained)
    if not method.is_full:  # the config of a model says itself how its weights are stored
        run.adapter_metadata.save(folder)
    own_tokenizer = pretrained.adapter is not None and pretrained.adapter.has_tokenizer
    other_template = run.options.data.chat_template is not None
    if method.trainable_tokens() or run.options.lora.special_tokens or own_tokenizer or other_template:
        save_tokenizer(pretrained.tokenizer, folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    _logger.info("Saved the %s (%.1f MiB): %s", "model" if method.is_full else "adapter", size, folder)
    return folder


def _measure(trained: TrainedRun) -> list[dict[str, Any]]:
    """Write eval_results.json, and return the rows of the run with everything that was measured of the saved adapter."""
    run, rows = trained.prepared, trained.rows
    options, objective = run.options.run, run.objective
    if objective.held_out is None:
        return rows
    before, after = _held_out_metrics(rows, best=options.early_stopping_patience > 0)
    if objective.score is not None and not options.predict_with_generate:
        after |= {f"eval_{name}": value for name, value in objective.score(trained.model).items()}
    (options.output / "eval_results.json").write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
    _logger.info("%s", _compare(before, after, run.spec.objective.unit))
    return [row | after if row["step"] == trained.chosen_step else row for row in rows]


def _write_card(trained: TrainedRun, folder: Path, rows: list[dict[str, Any]]) -> None:
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
    write_card(folder, card)


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


def _held_out_metrics(rows: Sequence[dict[str, Any]], *, best: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the held-out metrics before training, and those of the adapter: of the lowest loss if `best`, else the last."""
    evaluated = [row for row in rows if "eval_loss" in row]
    after = min(evaluated[1:], key=lambda row: row["eval_loss"]) if best else evaluated[-1]
    before, after = ({k: v for k, v in row.items() if k.startswith(("step", "eval_"))} for row in (evaluated[0], after))
    return before, after


def _compare(before: dict[str, Any], after: dict[str, Any], unit: Unit) -> str:
    """Return the held-out metrics before and after in words."""
    lines = []
    for name in (name for name in after if name.startswith("eval_")):
        start = f"{before[name]:.3f} before, " if name in before else ""
        line = f"Held-out {name.removeprefix('eval_')} {start}{after[name]:.3f} after"
        if name == "eval_loss" and unit == TOKENS:
            line += f" (perplexity {perplexity(before[name]):.1f} and {perplexity(after[name]):.1f})"
        lines.append(f"{line}.")
    return "\n".join(lines)
