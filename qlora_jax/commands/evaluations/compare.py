"""Compare a base model, its quantised form, adapters on it, and the merged models, on data that no adapter was trained on.

    python scripts/evaluate.py compare runs/plain-answers
    python scripts/evaluate.py compare meta-llama/Llama-3.1-8B runs/a/adapter runs/b/adapter --data test.jsonl
    python scripts/evaluate.py compare runs/mine --mmlu cais/mmlu --judgements verdicts.jsonl

The first name is the base, unless it is an adapter of a run, whose base is then taken. The data are --data, else the rows
that the run held out. Four kinds of models are loaded, one after the other: the base in its own precision, the base as it
was stored in training, each adapter on that, and each adapter merged into the original weights. A drift is what storage or
merging changes; a gain is what an adapter changes. All intervals resample the texts or questions, those of changes in pairs.
The last line is JSON.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tyro
from flax import nnx

from qlora_jax import cli
from qlora_jax.adapters.pretrained import Pretrained
from qlora_jax.commands.evaluations.output import bounds, check_least, number, print_json, print_table
from qlora_jax.commands.evaluations.perplexity import PerplexityOptions, windows_of
from qlora_jax.commands.evaluations.task import TaskOptions, harness_model, open_tasks, run_tasks
from qlora_jax.data import Template, check_ids
from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate import (
    Change,
    Document,
    Measured,
    Question,
    Share,
    change_of,
    documents_of,
    encode_questions,
    evaluate_perplexity,
    judged_points,
    letter_logits,
    read_documents,
    read_judgements,
    read_questions,
    value_of,
    verdict_of,
)
from qlora_jax.finetune.contestants import Contestant, contestants
from qlora_jax.finetune.held_out import read_held_out, recorded_options, run_of
from qlora_jax.models import CausalLM, positions_left
from qlora_jax.nn import data_mesh, mesh_context


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """The base (folder, .gguf file or hub id), and adapters (folders, hub ids, or folders of runs). The base may be left out
    before an adapter of a run."""
    revision: str | None = None
    """Branch, tag or commit of the base on the hub."""
    data: str | None = None
    """A .txt file, a file or folder of rows, or a data set on the hub; the held-out rows of the run if left out."""
    split: str | None = None
    """Split of a data set; train if left out."""
    template: Template | None = None
    """How conversations of --data are written; if left out, as in the first adapter's training."""
    limit: int | None = None
    """Number of texts, the first ones; all of them if left out."""
    max_length: int | None = None
    """Number of tokens of a window; 1024 if left out, or fewer if the model has fewer positions."""
    mmlu: str | None = None
    """A file of MMLU questions with whole prompts, or a file of questions to ask without examples."""
    mmlu_limit: int | None = None
    """Number of these questions, drawn at random; all of them if left out."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm_eval (the extra eval), as for evaluate.py task."""
    tasks_folder: Path | None = None
    """Folder of YAML files of tasks."""
    task_limit: int | None = None
    """Number of documents of each task, the first ones; all of them if left out."""
    judgements: Path | None = None
    """File of scores or verdicts (JSONL) of answers that evaluate.py generate wrote with the same model and adapters."""
    merged: bool = True
    """Whether to merge each adapter and measure the merged model too; it is written to a temporary folder."""
    dtype: str = "auto"
    """Compute type: auto, float32 or bfloat16."""
    batch_size: int = 4
    """Number of texts in a batch."""
    resamples: int = 1_000
    """Number of resamples for the intervals."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        check_least(self, limit=1, max_length=2, mmlu_limit=1, task_limit=1, batch_size=1, resamples=1, seed=0)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise OptionError(f"dtype: expected auto, float32 or bfloat16, found {self.dtype!r}")


@dataclasses.dataclass(frozen=True)
class Row:
    """A model in the table by one metric."""

    metric: str
    model: str
    measured: Measured
    change: Change | None
    against: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """What each model is asked while its weights are loaded, beside the perplexity.

    Attributes:
        questions: of MMLU; none if they are empty.
        tasks: returns the results of a model in tasks of lm_eval; None: no tasks.
    """

    questions: tuple[Question, ...]
    tasks: Callable[[Pretrained, CausalLM], dict[str, Measured]] | None


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(compare, Options, __doc__, arguments, program=program)


def compare(options: Options) -> None:
    """Print what quantisation, adapters and merging change."""
    models = contestants(
        options.models,
        revision=options.revision,
        dtype=None if options.dtype == "auto" else options.dtype,
        merged=options.merged,
    )
    first = next(one.pretrained for one in models if one.pretrained.adapter is not None)
    documents, description = documents_for(options, models, first)
    print(description, file=sys.stderr)
    for one in models:
        for document in documents:
            check_ids(document.tokens, first.tokenizer, one.pretrained.checkpoint.model_config.vocab_size, f"{one.name}: ")
    questions = () if options.mmlu is None else mmlu_questions(options)
    tasks = tasks_of(options)
    judged = (
        {}
        if options.judgements is None
        else judged_points(read_judgements(options.judgements), {one.name: one.judged_as for one in models})
    )
    found = {one.name: measure(one, options, documents, first, Asked(questions, tasks)) for one in models}
    for name, share in judged.items():
        found[name]["judged, % of points"] = share
    rows = rows_of(models, found, options)
    draws = {"resamples": options.resamples, "seed": options.seed}
    header = ["metric", "model", "value", "95 % interval", "against", "kind", "change", "95 % interval", "verdict"]
    print_table(header, [cells_of(row, draws) for row in rows])
    print()
    print_json({"compare": [plain(row, draws) for row in rows], "data": description, **draws})


def documents_for(options: Options, models: Sequence[Contestant], first: Pretrained) -> tuple[list[Document], str]:
    """Return (the texts to measure on, a description of them): those of --data, else what the runs held out.

    Raises:
        OptionError: no --data, and the adapters are of no run, or of runs that held out different rows.
    """
    config = first.checkpoint.model_config
    if options.data is not None:
        template = options.template or (first.adapter_metadata and first.adapter_metadata.template) or "auto"
        return read_documents(
            options.data,
            first.tokenizer,
            split=options.split,
            template=cast(Template, template),
            limit=options.limit,
            vocabulary=config.vocab_size,
        )
    adapters = {one.adapter: run_of(one.adapter) for one in models if one.adapter is not None}
    if without := [adapter for adapter, run in adapters.items() if run is None]:
        raise OptionError(f"--data: expected data, because {without[0]} is not part of a run that held rows out; found none")
    runs = [run for run in adapters.values() if run is not None]
    splits = {run: (record.data, record.run.seed) for run in runs if (record := recorded_options(run))}
    if other := [run for run in runs if splits[run] != splits[runs[0]]]:
        raise OptionError(
            f"--data: expected data, because {runs[0]} and {other[0]} held out different rows: one may have been trained on "
            "those of the other"
        )
    examples = read_held_out(runs[0], first.tokenizer, config)[: options.limit]
    learned = sum(int(example.loss_mask.sum()) for example in examples)
    return documents_of(examples), f"{len(examples):,} held-out texts of {runs[0]}, {learned:,} tokens of answers"


def mmlu_questions(options: Options) -> tuple[Question, ...]:
    """Return the questions of --mmlu; those that come without whole prompts are asked without examples."""
    try:
        return read_questions(str(options.mmlu), shots=0, limit=options.mmlu_limit, seed=options.seed).questions
    except DataError as error:
        raise DataError(f"--mmlu {error}") from error


def tasks_of(options: Options) -> Callable[[Pretrained, CausalLM], dict[str, Measured]] | None:
    """Return what measures a loaded model by the tasks of lm_eval, or None if there are none.

    Raises:
        OptionError: lm_eval is not installed, or a task is unknown.
    """
    if not options.tasks:
        return None
    asked = TaskOptions(
        options.tasks, tasks_folder=options.tasks_folder, limit=options.task_limit, batch_size=options.batch_size
    )
    manager = open_tasks(asked)
    return lambda pretrained, model: task_shares(run_tasks(harness_model(pretrained, model, asked), asked, manager))


def measure(
    one: Contestant, options: Options, documents: list[Document], first: Pretrained, asked: Asked
) -> dict[str, Measured]:
    """Load a model, and return what was measured of it by metric; its weights are freed afterwards."""
    progress = sys.stderr.isatty()
    print(f"{one.name}: {one.description}", file=sys.stderr)
    windows = PerplexityOptions(max_length=options.max_length)
    length, stride = windows_of(one.pretrained, windows)
    with mesh_context(data_mesh()), one.loaded(progress=progress) as model:
        assert isinstance(model, CausalLM)  # `contestants` raises an error for other models
        graphdef, state = nnx.split(model)
        sizes = {"max_length": length, "stride": stride, "batch_size": options.batch_size}
        found: dict[str, Measured] = {
            "perplexity": evaluate_perplexity(graphdef, state, documents, first.tokenizer, progress=progress, **sizes)
        }
        if asked.questions:
            room = positions_left(one.pretrained.checkpoint.model_config, one.pretrained.method)
            prompts = encode_questions(asked.questions, one.pretrained.tokenizer, 2048 if room is None else min(2048, room))
            logits = letter_logits(graphdef, state, prompts, batch_size=options.batch_size, progress=progress)
            found["MMLU, % right"] = Share((logits.argmax(1) == np.asarray(prompts.answers)).astype(np.float64))
        if asked.tasks is not None:
            found |= asked.tasks(one.pretrained, model)
    return found


def task_shares(results: dict[str, Any]) -> dict[str, Measured]:
    """Return the metrics of tasks that are means over documents, with the value of each document."""
    found: dict[str, Measured] = {}
    for name, samples in results["samples"].items():
        for metric in samples[0]["metrics"] if samples else ():
            values = [sample.get(metric) for sample in samples]
            if all(isinstance(value, int | float) for value in values):
                found[f"{name}, {metric} in %"] = Share(np.asarray(values, np.float64))
    return found


def rows_of(models: Sequence[Contestant], found: dict[str, dict[str, Measured]], options: Options) -> list[Row]:
    """Return the rows of the table: all models by each metric."""
    draws, rows = {"resamples": options.resamples, "seed": options.seed}, []
    for metric in dict.fromkeys(metric for measured in found.values() for metric in measured):
        for one in (one for one in models if metric in found[one.name]):
            ours, theirs = found[one.name][metric], found.get(one.against or "", {}).get(metric)
            change = None if theirs is None else change_of(ours, theirs, one.kind, **draws)
            rows.append(Row(metric, one.name, ours, change, one.against or ""))
    return rows


def cells_of(row: Row, draws: dict[str, int]) -> list[str]:
    """Return a row of the table as text."""
    digits = 3 if row.metric == "perplexity" else 1
    value = value_of(row.measured, **draws)
    cells = [row.metric, row.model, number(value.value, digits), bounds(value, digits)]
    if row.change is None:
        return [*cells, "", "", "", "", ""]
    change = row.change.interval
    text = f"{change.value:+.2f} {row.change.unit}"
    return [*cells, row.against, row.change.kind, text, f"{change.low:+.2f} to {change.high:+.2f}", verdict_of(row.change)]


def plain(row: Row, draws: dict[str, int]) -> dict[str, Any]:
    """Return a row as JSON holds it."""
    found: dict[str, Any] = {"metric": row.metric, "model": row.model, **dataclasses.asdict(value_of(row.measured, **draws))}
    if row.change is None:
        return found
    change = {"kind": row.change.kind, "unit": row.change.unit, **dataclasses.asdict(row.change.interval)}
    return found | {"against": row.against, "change": change | {"verdict": verdict_of(row.change)}}
