"""Experiment trackers: what goes into `metrics.jsonl` goes to TensorBoard and Weights & Biases too.

    metrics.jsonl            there
    loss, learning_rate …    train/loss, train/learning_rate …
    eval_loss                eval/loss
    mmlu_accuracy_anatomy    mmlu/accuracy_anatomy

A run that resumes continues the same record, which has no step twice. TensorBoard: <output>/tensorboard gets one more file,
which declares the steps after the checkpoint in the files before it void. W&B: the id of the run is saved in <output>/wandb.
Its history can only be appended to, so that steps which it has already are not sent again (they are the same, bit for bit).

W&B is set by its own environment variables: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_API_KEY.
"""

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qlora_jax.errors import OptionError
from qlora_jax.finetune.options.reporting import TrackerName

Listener = Callable[[dict[str, Any]], None]
_PACKAGES: dict[TrackerName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_PREFIXES = ("eval", "mmlu")
_PROJECT = "qlora_jax"


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise OptionError where a tracker is not installed, or nobody is logged in to it."""
    for name in names:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise OptionError(
                f"report_to {name}: expected the package {package}, found it not installed; "
                f"pip install {package} (or qlora-jax[{name}])"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb  # pyright: ignore[reportMissingImports]

        try:
            logged_in = wandb.login()  # asks in a terminal
        except wandb.Error as error:
            raise OptionError(f"report_to wandb: expected to be logged in, found: {error}") from error
        if not logged_in:
            raise OptionError("report_to wandb: expected to be logged in, found no API key; run `wandb login`")


def open_trackers(
    names: Sequence[TrackerName],
    output: Path,
    options: dict[str, Any],
    *,
    resume_at: int,
    reached: int,
    open_files: ExitStack,
) -> list[Listener]:
    """Return the functions that take the rows of a run from now on; `open_files` closes them.

    Args:
        output: folder of the run.
        options: of the run, for the record.
        resume_at: step of the checkpoint from which the run resumes; 0 for a run that starts.
        reached: the highest step of which a tracker may have a row already; -1 for none.

    Raises:
        ConnectionError: W&B cannot be reached.
    """
    listeners: list[Listener] = []
    if "tensorboard" in names:
        listeners.append(_tensorboard(output / "tensorboard", options, resume_at, open_files))
    if "wandb" in names:
        listeners.append(_wandb(output, options, reached, open_files))
    return listeners


def _tensorboard(folder: Path, options: dict[str, Any], resume_at: int, open_files: ExitStack) -> Listener:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    # Names of files go to the second only; the suffix keeps apart those of a run that resumes within it.
    void_from = resume_at + 1 if resume_at else 0
    suffix = f".{len(list(folder.glob('*')))}"
    writer = open_files.enter_context(SummaryWriter(str(folder), purge_step=void_from, filename_suffix=suffix))
    if resume_at == 0:
        writer.add_text("options", f"```json\n{json.dumps(options, indent=2)}\n```", 0)

    def listen(row: dict[str, Any]) -> None:
        for name, value in _values(row).items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()  # a kill must not leave a gap before the checkpoint

    return listen


def _wandb(output: Path, options: dict[str, Any], reached: int, open_files: ExitStack) -> Listener:
    import wandb  # pyright: ignore[reportMissingImports]

    record = output / "wandb" / "run_id"
    known = record.exists()
    if not known:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", output.name),
            id=record.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(output),
            config=options,
        )
    except wandb.Error as error:
        raise ConnectionError(f"report_to wandb: the run could not be opened: {error}") from error
    open_files.enter_context(run)
    # Offline nothing is known of what was sent, and a row may have been: what the records reached counts as sent.
    first = run.step if run.resumed else reached + 1 if known else 0

    def listen(row: dict[str, Any]) -> None:
        if row["step"] >= first:
            run.log(_values(row), step=row["step"])

    return listen


def _values(row: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a row by the names that they have in a tracker."""
    values = {}
    for name, value in row.items():
        if name == "step" or not isinstance(value, (int, float)):  # words about a bad step
            continue
        prefix, _, rest = name.partition("_")
        values[f"{prefix}/{rest}" if prefix in _PREFIXES else f"train/{name}"] = value
    return values
