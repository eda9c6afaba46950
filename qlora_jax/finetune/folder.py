"""The folder of a run. `options.json` records the options that decide the result of the run.

An empty folder is free. An unfinished run with the same options is resumed. Everything else is an error before any work, so
that no run is overwritten or mixed with another. `--overwrite` deletes only the files of a run, and only when the new run is
about to write its first file.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qlora_jax.cli import to_dict
from qlora_jax.errors import OptionError
from qlora_jax.finetune.options.options import Options
from qlora_jax.renamed_options import replace_old_names

RECORD = "options.json"
COMPLETED = "completed"  # the last file that a run makes
_WRITING = f".{RECORD}.writing"
_LOGS = ("metrics.jsonl", "samples.jsonl")
_OWN = (
    *("adapter", "model", "best", "checkpoints", *_LOGS, *(f".{name}.writing" for name in _LOGS)),
    *("tensorboard", "wandb", "eval_results.json", "loss.png", COMPLETED, RECORD, _WRITING),
)


def claim(options: Options) -> None:
    """Check that the folder can be written, and is free or holds this same run unfinished. Nothing is changed.

    Raises:
        OptionError: it is not a folder, holds another or a finished run (without --overwrite), or other files.
        OSError: the folder cannot be written.
    """
    folder, record = options.run.output, options.run.output / RECORD
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output {folder}: expected a folder, found a file")
    _check_writable(folder)
    if not folder.exists() or all(path.name == _WRITING for path in folder.iterdir()):
        return
    if not record.exists():
        raise OptionError(f"--output {folder}: expected an empty folder or a run to resume, found other files")
    if options.run.overwrite:
        return
    if (folder / COMPLETED).exists() and any(
        (folder / saved).exists() for saved in ("adapter/adapter_config.json", "model/config.json")
    ):
        raise OptionError(f"--output {folder}: holds a finished run; choose another folder, or --overwrite to delete it")
    before, now, defaults = _read(record), record_of(options), record_of(Options())
    different = [
        f"{group}.{name}: {there!r} there, {value!r} here"
        for group, values in now.items()
        for name, value in values.items()
        # An option that did not exist yet had its default.
        if (there := before.get(group, {}).get(name, defaults[group][name])) != value
    ]
    if different:
        raise OptionError(
            f"--output {folder}: holds another run ({'; '.join(different)}); "
            "choose another folder, or --overwrite to delete it"
        )


def start(options: Options) -> None:
    """Begin the run in its folder: with --overwrite delete the files of the run before, and write the record."""
    folder = options.run.output
    if options.run.overwrite and (folder / RECORD).exists():
        for name in _OWN:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / _WRITING  # a run that is killed in between leaves no incomplete record
    temporary.write_text(json.dumps(record_of(options), indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)


def complete(options: Options) -> None:
    """Mark the run as finished: from now on it is not resumed."""
    (options.run.output / COMPLETED).touch()


def record_of(options: Options) -> dict[str, Any]:
    """Return the options that decide the result of a run."""
    record = to_dict(options)
    for name in ("output", "overwrite", "samples", "keep", "save_every", "memory_check"):
        del record["run"][name]
    del record["data"]["show_examples"]
    for name in ("mmlu_every", "mmlu_batch_size", "sample_every", "report_to", "push_to_hub", "hub_private"):
        del record["watch"][name]
    return record


def _read(record: Path) -> dict[str, dict[str, Any]]:
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
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
