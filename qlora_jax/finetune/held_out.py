"""The held-out examples of a run, from its folder: what the run was not trained on, to measure models with.

The record of the run (`options.json`) has its data and how they were split. The data are read again in the same way; the
checksum in the record tells whether they are still the same.
"""

import dataclasses
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from qlora_jax.config_file import from_values
from qlora_jax.data import Example, checksum
from qlora_jax.errors import DataError, OptionError
from qlora_jax.finetune.folder import RECORD, read_record, recorded_held_out
from qlora_jax.finetune.objectives import Setting
from qlora_jax.finetune.objectives.sft import SFT, read_sft_corpus
from qlora_jax.finetune.options.options import Options
from qlora_jax.models import ModelConfig

__all__ = ["read_held_out", "recorded_options", "run_of"]


def run_of(adapter: str | Path) -> Path | None:
    """Return the folder of the run that an adapter is part of, or that is named itself; None: there is none."""
    path = Path(adapter).expanduser().resolve()
    return next((folder for folder in (path, path.parent) if (folder / RECORD).is_file()), None)


def recorded_options(folder: Path) -> Options:
    """Return the options of the run in a folder.

    Raises:
        OptionError: the record is damaged.
    """
    names = {field.name for field in dataclasses.fields(Options)}
    values = {name: group for name, group in read_record(folder / RECORD).items() if name in names}
    known = {field.name for field in dataclasses.fields(Options().run)}
    values["run"] = {name: value for name, value in values.get("run", {}).items() if name in known}
    return from_values(Options, values, str(folder / RECORD))


def read_held_out(folder: Path, tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> list[Example]:
    """Return the held-out examples of the run in a folder.

    Args:
        folder: the folder of a run with the objective sft.
        tokenizer: that of the adapter.
        config: of its base.

    Raises:
        OptionError: the run has another objective, or held nothing out.
        DataError: the data of the run have changed since, or cannot be used.
        OSError: they are not there any more.
    """
    options = recorded_options(folder)
    if options.objective.objective != SFT.name:
        raise OptionError(
            f"{folder}: expected a run with objective {SFT.name}, found {options.objective.objective}; give --data"
        )
    try:
        _, corpus = read_sft_corpus(Setting(options, tokenizer, config, frozenset(), progress=False))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the data of the run {folder}: {error}; start in the folder of the run, or give --data"
        ) from error
    if not corpus.held_out:
        raise OptionError(f"{folder}: expected a run with held-out examples, found none; give --data")
    recorded = recorded_held_out(folder)
    if recorded is not None and recorded != checksum(corpus.held_out):
        raise DataError(
            f"{folder}: the held-out examples are not those of the run, because its data have changed; give --data"
        )
    return corpus.held_out
