"""Finds a data file that does not exist before any other is read and tokenized."""

from qlora_jax.data import NAMED, check_local
from qlora_jax.finetune.options.data import DataOptions

__all__ = ["check_sources"]


def check_sources(data: DataOptions) -> None:
    """Raise FileNotFoundError where `data` or `eval_data` names a file or folder that does not exist.

    A name that may be the id of a data set on the hub is left to the reader of the data.
    """
    for source in (*data.sources, *([] if data.eval_data is None else [data.eval_data])):
        if source not in NAMED:
            check_local(source)
