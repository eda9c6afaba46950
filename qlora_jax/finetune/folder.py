"""The folder of a run. `options.json` records the options of the run, and `completed` marks its end.

A folder without a run is free, whatever other files it holds. An unfinished run with the same options is resumed, and a
finished one is extended if it is to have more steps. Everything else is an error before any work, so that no run is
overwritten or mixed with another. `--overwrite` deletes only the files of a run, and only when the new run is about to write
its first file.

The length of a run and the split of a step's rows over devices and micro-batches may change when it resumes.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from qlora_jax.checkpoint.whole_folder import remove_abandoned, temporary_folder
from qlora_jax.cli import to_dict
from qlora_jax.cluster import HostOptions
from qlora_jax.errors import OptionError, shortened
from qlora_jax.finetune.lock import remove_abandoned_lock
from qlora_jax.finetune.options.health import PROFILE, STALLED, HealthOptions
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.options.run import RunOptions
from qlora_jax.nn import shape_on
from qlora_jax.renamed_options import replace_old_names
from qlora_jax.train.state_store import latest_step

RECORD = "options.json"
COMPLETED = "completed"  # the last file that a run makes
CHECKPOINTS = "checkpoints"
_LOGS = ("metrics.jsonl", "samples.jsonl")
GOODPUT = "goodput.json"
_WRITTEN = (*_LOGS, RECORD, "loss.png", "eval_results.json", GOODPUT)
_TEMPORARY = tuple(f".{name}.writing" for name in _WRITTEN)  # one run at a time writes them (lock.py)
_OWN = ("adapter", "model", "best", CHECKPOINTS, *_LOGS, "tensorboard", "wandb", "eval_results.json", "loss.png", COMPLETED)
_OWN += (GOODPUT, STALLED, PROFILE)
# What may be another in a run that resumes: how it goes on and is saved, its length, and how the rows of a step are split.
_FREE = {
    "run": (
        *("output", "overwrite", "samples", "keep", "save_every", "memory_check"),
        *("epochs", "max_steps", "batch_size", "accumulation_steps", "mesh"),
    ),
    "data": ("show_examples",),
    "tuning": ("save_dtype",),
    "hosts": tuple(field.name for field in dataclasses.fields(HostOptions)),
    "watch": ("mmlu_every", "mmlu_batch_size", "sample_every", "report_to", "push_to_hub", "hub_private"),
    "health": tuple(field.name for field in dataclasses.fields(HealthOptions)),
}
_ROWS = "rows_of_step"  # recorded in the group "run"
_HELD_OUT = ("held_out_data", "checksum")  # a group and a key of the record, beside the options


def claim(options: Options) -> None:
    """Check that the folder can be written, and holds no other run than this one. Nothing is changed.

    Raises:
        OptionError: it is not a folder, or holds another run or the same one finished (without --overwrite).
        OSError: the folder cannot be written.
    """
    folder, record = options.run.output, options.run.output / RECORD
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output {folder}: expected a folder, found a file")
    _check_writable(folder)
    if not folder.exists():
        return
    if not record.exists():
        if found := [name for name in _OWN if (folder / name).exists()]:
            raise OptionError(
                f"--output {folder}: expected no {', '.join(found)} without {RECORD}: these are no files of a run that can "
                "be resumed; move them, or choose another folder"
            )
        return
    if options.run.overwrite:
        return
    before = read_record(record)
    if different := [*_differences(before, options), *_other_rows(before, options)]:
        raise OptionError(
            f"--output {folder}: holds another run ({'; '.join(different)}); "
            "choose another folder, or --overwrite to delete it"
        )
    if is_finished(folder) and not _has_other_length(before, options):
        remove_abandoned_lock(folder)
        raise finished_error(folder)


def finished_error(folder: Path) -> OptionError:
    """Return the error for a finished run that is not to have more steps."""
    return OptionError(
        f"--output {folder}: holds a finished run; more --max-steps or --epochs extend it; "
        "or choose another folder, or --overwrite to delete it"
    )


def is_finished(folder: Path) -> bool:
    """Return whether the folder holds a finished run, with what it trained."""
    return (folder / COMPLETED).exists() and any(
        (folder / saved).exists() for saved in ("adapter/adapter_config.json", "model/config.json")
    )


def start(options: Options, held_out_checksum: int) -> None:
    """Begin the run in its folder, or go on: with --overwrite delete the files of the run before, and write the record.

    The caller holds the lock of the folder: what a killed run left there half written is removed.

    Args:
        options: the options of the run.
        held_out_checksum: the checksum of its held-out examples.
    """
    folder = options.run.output
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in (".removed-", ".adapter.writing-", ".model.writing-"):
        remove_abandoned(folder, prefix)
    if options.run.overwrite and (folder / RECORD).exists():
        with temporary_folder(folder, ".removed-") as removed:
            # Each is out of the way at once: a run that is killed here leaves nothing that looks like a checkpoint.
            for name in (COMPLETED, *_OWN, RECORD):
                if (folder / name).exists():
                    (folder / name).rename(removed / name)
    for name in (*_TEMPORARY, COMPLETED):  # a run that goes on is not completed
        (folder / name).unlink(missing_ok=True)
    group, key = _HELD_OUT
    record = record_of(options) | {group: {key: held_out_checksum}}
    replace_file(folder / RECORD, json.dumps(record, indent=2) + "\n")


def recorded_held_out(folder: Path) -> int | None:
    """Return the checksum of the held-out examples of the run in a folder; None if an earlier version recorded it."""
    group, key = _HELD_OUT
    return read_record(folder / RECORD).get(group, {}).get(key)


def complete(options: Options) -> None:
    """Mark the run as finished: from now on it is extended, not resumed."""
    (options.run.output / COMPLETED).touch()


def replace_file(path: Path, text: str) -> None:
    """Write a file of the run, which is whole or as it was before if the process is killed in between."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def saved_work(options: Options) -> str:
    """Return what of a run is saved, for the message of an interruption."""
    folder = options.run.output
    again = "the same command without --overwrite" if options.run.overwrite else "the same command"
    try:
        ours = not _differences(read_record(folder / RECORD), options)
    except (OSError, ValueError):
        ours = False
    if ours and is_finished(folder):
        return f"{folder} holds the finished run"
    step = latest_step(folder / CHECKPOINTS) if ours else None
    if step is None:
        return "nothing of the run is saved yet"
    return f"step {step} is saved in {folder}; {again} goes on from there"


def record_of(options: Options) -> dict[str, Any]:
    """Return the options of a run, as they are recorded."""
    record = to_dict(options)
    for name in ("output", "overwrite", "memory_check"):
        del record["run"][name]
    del record["hosts"]
    record["run"][_ROWS] = options.run.rows_of_step(jax.device_count())
    return record


def _differences(before: dict[str, dict[str, Any]], options: Options) -> list[str]:
    """Return the options that decide the result of a run, however its steps are split, and are others than recorded."""
    now, defaults = to_dict(options), to_dict(Options())
    return [
        f"{group}.{name}: {shortened(there, 500)} there, {shortened(value, 500)} here"
        for group, values in now.items()
        for name, value in values.items()
        # An option that did not exist yet had its default.
        if name not in _FREE.get(group, ())
        and (there := before.get(group, {}).get(name, defaults[group][name])) != value
        and not _same_path(there, value)
    ]


def _other_rows(before: dict[str, dict[str, Any]], options: Options) -> list[str]:
    """Return the number of rows of a step, if it is another than recorded."""
    run, rows, devices = before.get("run", {}), options.run.rows_of_step(jax.device_count()), jax.device_count()
    there = run.get(_ROWS)
    if there is None:  # recorded by an earlier version, then on as many devices as now, all of them along fsdp
        split = {name: run.get(name, getattr(RunOptions, name)) for name in ("batch_size", "accumulation_steps", "mesh")}
        there = dataclasses.replace(options.run, **split).rows_of_step(devices)
    if there == rows:
        return []
    shards = shape_on(options.run.mesh_shape, devices).row_shards  # the devices of a tensor axis share their rows
    return [f"rows of a step (batch_size x accumulation_steps x {shards} devices): {there} there, {rows} here"]


def _has_other_length(before: dict[str, dict[str, Any]], options: Options) -> bool:
    run, now = before.get("run", {}), options.run
    return (run.get("epochs", now.epochs), run.get("max_steps")) != (now.epochs, now.max_steps)


def _same_path(one: object, other: object) -> bool:
    """Return whether two values name the same file or folder in different ways."""
    try:
        paths = [os.path.expanduser(value) for value in (one, other) if isinstance(value, str)]
        return len(paths) == 2 and os.path.samefile(*paths)
    except (OSError, ValueError):
        return False


def read_record(record: Path) -> dict[str, dict[str, Any]]:
    """Return the record of a run: its options by group, under their present names.

    Raises:
        OptionError: the record is damaged.
    """
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{record}: is damaged ({error}); --overwrite deletes the run") from error
    if not isinstance(values, dict) or not all(isinstance(group, dict) for group in values.values()):
        raise OptionError(f"{record}: expected the options of a run, found other JSON; --overwrite deletes the run")
    return replace_old_names(values)  # an earlier version may have written it


def _check_writable(folder: Path) -> None:
    """Try to write a file in the folder, or in its nearest parent that exists."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OptionError(f"--output {folder}: expected a folder, found the file {existing} on the way")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"--output {folder}: cannot be written: {error.strerror or error}") from error
