"""Measure a model, with or without an adapter, by tasks of EleutherAI's lm-evaluation-harness (the extra `eval`).

    python scripts/evaluate.py task arc_easy hellaswag --model meta-llama/Llama-3.1-8B --adapter runs/mine/adapter
    python scripts/evaluate.py task my_task.yaml --limit 200
    python scripts/evaluate.py task my_task --tasks-folder tasks --few-shot 5

A task is a name that lm_eval knows (`lm-eval ls tasks` lists them), one of the YAML files of --tasks-folder, or the path of
a YAML file. The prompts, the metrics and their standard errors are those of lm_eval; the model runs in JAX. The last line is
JSON.
"""

import dataclasses
import difflib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from flax import nnx

from qlora_jax import cli
from qlora_jax.adapters.pretrained import Pretrained, PretrainedOptions
from qlora_jax.commands.evaluations.output import bounds, check_least, number, print_json, print_table
from qlora_jax.errors import DataError, OptionError, list_names
from qlora_jax.evaluate import Interval, TokenScores, token_scores
from qlora_jax.models import CausalLM, causal_family_of, positions_left
from qlora_jax.nn import data_mesh, mesh_context
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.offline import answer_all
from qlora_jax.serve.request import Choices, Request
from qlora_jax.serve.scheduler import Limits

if TYPE_CHECKING:
    from qlora_jax.evaluate.harness import Generation, HarnessModel

_LONGEST = 2048  # tokens that a model without a limit reads at a time, as in lm_eval


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Options of the tasks."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of tasks or groups, or paths of YAML files."""
    tasks_folder: Path | None = None
    """Folder of YAML files of tasks."""
    few_shot: int | None = None
    """Number of solved examples before each question; that of the task if left out."""
    limit: int | None = None
    """Number of documents of each task, the first ones; all of them if left out."""
    chat: bool = False
    """Write prompts by the chat template."""
    max_length: int | None = None
    """Maximum number of tokens that the model reads at a time; those of its positions if left out."""
    batch_size: int = 8
    """Number of rows in a batch."""
    seed: int = 0
    """Seed of the sampling, for tasks that sample."""

    def __post_init__(self) -> None:
        check_least(self, few_shot=0, limit=1, max_length=2, batch_size=1, seed=0)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    task: TaskOptions = dataclasses.field(default_factory=TaskOptions)
    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(task, Options, __doc__, arguments, program=program)


def task(options: Options) -> None:
    """Print the results of tasks."""
    asked = options.task
    if not asked.names:
        raise OptionError("task: expected names of tasks, found none")
    manager = open_tasks(asked)
    pretrained = options.model.open()
    causal_family_of(pretrained.checkpoint.config)  # raises for an encoder-decoder
    length_of(pretrained, asked)
    with mesh_context(data_mesh()):
        model = pretrained.load(mesh=data_mesh(), progress=sys.stderr.isatty())
        assert isinstance(model, CausalLM)
        results = run_tasks(harness_model(pretrained, model, asked), asked, manager)
    rows = rows_of(results)
    header = ["task", "metric", "value", "95 % interval", "documents"]
    print_table(header, [[name, metric, number(one.value, 4), bounds(one, 4), f"{n:,}"] for name, metric, one, n in rows])
    print()
    found: dict[str, dict[str, Any]] = {}
    for name, metric, interval, count in rows:
        found.setdefault(name, {"documents": count})[metric] = dataclasses.asdict(interval)
    print_json({"tasks": found})


def open_tasks(options: TaskOptions) -> Any:
    """Return lm_eval's manager of tasks, which knows all that the options name.

    Raises:
        OptionError: lm_eval is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise OptionError(f'task: {error.name} is not installed: pip install "qlora-jax[eval]"') from error
    if options.tasks_folder is not None and not options.tasks_folder.is_dir():
        raise OptionError(f"--tasks-folder {options.tasks_folder}: expected a folder, found none")
    manager = TaskManager(include_path=None if options.tasks_folder is None else str(options.tasks_folder))
    for name in options.names:
        if Path(name).suffix in (".yaml", ".yml"):
            if not Path(name).is_file():
                raise OptionError(f"task {name}: expected a YAML file, found none")
        elif name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {list_names(near)}?" if near else ""
            raise OptionError(
                f"task {name}: expected one of the {len(manager.all_tasks):,} tasks of lm_eval or a YAML file{hint}"
            )
    return manager


def harness_model(pretrained: Pretrained, model: CausalLM, options: TaskOptions) -> "HarnessModel":
    """Return a loaded model as lm_eval calls it."""
    from qlora_jax.evaluate.harness import HarnessModel

    graphdef, state = nnx.split(model)
    vocabulary = pretrained.checkpoint.model_config.vocab_size

    def score(rows: Sequence[Any]) -> Sequence[TokenScores]:
        progress = sys.stderr.isatty()
        return token_scores(graphdef, state, rows, batch_size=options.batch_size, progress=progress, label="scoring")

    def answer(prompts: Sequence[Sequence[int]], generation: "Generation") -> list[str]:
        choices = Choices(
            temperature=generation.temperature, top_p=generation.top_p, top_k=generation.top_k, seed=options.seed
        )
        new = generation.max_new_tokens
        requests = {
            number: Request(tuple(prompt), new, choices, eos_ids=pretrained.stop_ids, stop=generation.stop)
            for number, prompt in enumerate(prompts)
        }
        engine = Engine(
            graphdef,
            state,
            limits=Limits(rows=min(options.batch_size, len(prompts)), capacity=max(map(len, prompts)) + new),
            vocabulary=vocabulary,
            tokenizer=pretrained.tokenizer,
        )
        found = dict(answer_all(engine, requests))
        return [found[number].text for number in range(len(prompts))]

    return HarnessModel(
        pretrained.tokenizer, score, answer, max_length=length_of(pretrained, options), name=pretrained.base.name
    )


def length_of(pretrained: Pretrained, options: TaskOptions) -> int:
    """Return the most tokens that the model reads at a time.

    Raises:
        OptionError: more than its positions are asked for.
    """
    room = positions_left(pretrained.checkpoint.model_config, pretrained.method)
    if room is not None and options.max_length is not None and options.max_length > room:
        raise OptionError(f"max_length: expected at most the {room:,} positions of the model, found {options.max_length:,}")
    return options.max_length or room or _LONGEST


def run_tasks(model: "HarnessModel", options: TaskOptions, manager: Any) -> dict[str, Any]:
    """Return lm_eval's results.

    Raises:
        DataError: a task cannot be read, or its data cannot.
    """
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        found = simple_evaluate(
            model,
            tasks=list(options.names),
            num_fewshot=options.few_shot,
            limit=options.limit,
            apply_chat_template=options.chat,
            task_manager=manager,
            random_seed=None,  # pyright: ignore[reportArgumentType]  None leaves the generators of the process alone
            numpy_random_seed=None,  # pyright: ignore[reportArgumentType]
            torch_random_seed=None,  # pyright: ignore[reportArgumentType]
        )
    except (KeyError, AssertionError, TypeError) as error:  # what lm_eval raises for a YAML file that is no task
        raise DataError(f"task {list_names(list(options.names))}: lm_eval cannot run it: {error!r}") from error
    assert found is not None  # None is for other processes than the first
    return dict(found)


def rows_of(results: dict[str, Any]) -> list[tuple[str, str, Interval, int]]:
    """Return (task, metric, value with 95 % of the normal distribution, documents) of results of lm_eval."""
    rows = []
    for name, metrics in results["results"].items():
        count = int(results.get("n-samples", {}).get(name, {}).get("effective", 0))
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            half = 1.96 * error if isinstance(error, int | float) else float("nan")
            rows.append(
                (name, metric if kind == "none" else f"{metric}, {kind}", Interval(value, value - half, value + half), count)
            )
    return rows
