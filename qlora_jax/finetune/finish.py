"""What a run leaves when training is over: files, figures of the held-out split, and answers before and after."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.bind import load_adapter
from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.tokenizer import save_tokenizer, tokenizer_source
from qlora_jax.evaluate import Prompts
from qlora_jax.finetune.objectives.answers import show_answers
from qlora_jax.finetune.objectives.objective import Objective
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.reporting import mmlu
from qlora_jax.finetune.reporting.card import write_card
from qlora_jax.finetune.saving import save_tuned
from qlora_jax.models import DecoderConfig, T5Config
from qlora_jax.peft import Method
from qlora_jax.train import TOKENS, Unit, best_evaluation, perplexity, plot_losses, without_adapter


def finish(
    options: Options,
    objective: Objective,
    graphdef: Any,
    adapter: Any,
    frozen: Any,
    rows: list[dict[str, Any]],
    *,
    name: str,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    config: DecoderConfig | T5Config,
    method: Method,
    record: AdapterMetadata,
    begin: Adapter | None,
    first: Adapter | None,
    taken: Mapping[str, np.ndarray],
    questions: Prompts | None,
    say: Callable[[str], None],
    progress: bool,
) -> Path:
    """Saves, measures and shows what was trained; returns the folder of the adapter, or of the model.

    Args:
        graphdef, adapter, frozen: the trained model in parts, as `train.split` gives them.
        rows: of the log.
        name: of the base, a folder or a hub id.
        begin: the adapter that the run began with, or None.
        first: what answers before training, where that is not the base.
        taken: what was taken off the base before it was stored (checkpoint/from_weights.py), by name.
        questions: of MMLU; None for none.
    """
    output = options.run.output
    plot_losses(rows, output / "loss.png", objective.step.unit)
    tuned = nnx.merge(graphdef, adapter, frozen)
    folder = save_tuned(
        tuned,
        output,
        method=method,
        base=name,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        tables=None if begin is None else begin.tables,
        taken=taken,
        progress=progress,
    )
    if options.tuning.method != "full":  # a model says for itself how it is held
        record.save(folder)
    if method.token_rows() or options.lora.special_tokens or tokenizer_source(name, options.model.adapter) != name:
        save_tokenizer(tokenizer, folder)
    kept = (best_evaluation(rows)[0] if options.run.early_stopping_patience else None) or rows[-1]["step"]
    what = "model" if options.tuning.method == "full" else "adapter"
    say(f"Saved the {what} ({_size(folder) / 2**20:.1f} MiB): {folder}")
    if objective.held_out is not None:
        before, after = _held_out(rows, best=options.run.early_stopping_patience > 0)
        if objective.score is not None and not options.run.predict_with_generate:
            after |= {f"eval_{name}": value for name, value in objective.score(tuned).items()}
        (output / "eval_results.json").write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
        say(_conclude(before, after, objective.step.unit))
        rows = [row | after if row["step"] == kept else row for row in rows]
    write_card(
        folder,
        options,
        config=config,
        quantization=record.quantization,
        embedding_storage=options.model.embedding_storage,
        rows=rows,
        kept=kept,
        unit=objective.step.unit,
        converted_from=record.converted_from,
        method=method,
    )
    if questions is not None:
        say(mmlu.conclude(rows, kept, partial(mmlu.figures, tuned, questions, options, progress=progress)))
    if objective.prompts:
        base = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, adapter), frozen)
        if tuned.prompt is not None and first is None:  # virtual tokens of zeros are tokens all the same
            base = without_adapter(tuned)
        untrained = base if first is None else load_adapter(base, first)
        show_answers(untrained, tuned, objective.prompts, objective.answer, tokenizer)
    elif objective.held_out is not None and options.run.samples:
        say("No answers are shown: in the held-out examples nothing comes before what is learned.")
    return folder


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _held_out(rows: Sequence[dict[str, Any]], *, best: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The held-out figures before training and of the adapter: that of the lowest loss if `best`, else the last."""
    evaluated = [row for row in rows if "eval_loss" in row]
    after = min(evaluated[1:], key=lambda row: row["eval_loss"]) if best else evaluated[-1]
    before, after = ({k: v for k, v in row.items() if k.startswith(("step", "eval_"))} for row in (evaluated[0], after))
    return before, after


def _conclude(before: dict[str, Any], after: dict[str, Any], unit: Unit) -> str:
    lines = []
    for name in (name for name in after if name.startswith("eval_")):
        start = f"{before[name]:.3f} before, " if name in before else ""
        line = f"Held-out {name.removeprefix('eval_')} {start}{after[name]:.3f} after"
        if name == "eval_loss" and unit == TOKENS:
            line += f" (perplexity {perplexity(before[name]):.1f} and {perplexity(after[name]):.1f})"
        lines.append(f"{line}.")
    return "\n".join(lines)
