"""What a run saves in the end: an adapter's folder, or after full fine-tuning a model's.

<output>/adapter    PEFT's files, read back and compared
<output>/model      a Hugging Face folder in the compute type of the run
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.bind import adapter_tensors, save_adapter
from qlora_jax.adapters.files import Adapter, write_adapter
from qlora_jax.adapters.weight_init import converted
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.export.merge import MergedDtype, merge
from qlora_jax.models import T5, Model
from qlora_jax.peft import Method


def save_tuned(
    model: Model,
    output: Path,
    *,
    method: Method,
    base: str,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast | None,
    tables: Mapping[str, np.ndarray] | None,
    taken: Mapping[str, np.ndarray],
    progress: bool,
) -> Path:
    """Saves what was trained; returns its folder.

    Args:
        output: of the run.
        base: path or hub id of the base, as PEFT's users find it.
        checkpoint: the base.
        tokenizer: what goes beside a model; None: nothing.
        tables: those of an adapter that the run went on from (`Adapter.tables`).
        taken: what was taken off the base before it was stored (checkpoint/from_weights.py).

    Raises:
        CheckpointError: it could not be written.
    """
    folder = output / "adapter"
    if taken or method.changes_base:
        tensors, plain = converted(adapter_tensors(model), method, taken)
        return write_adapter(
            tensors,
            folder,
            method=plain,
            base_model_name_or_path=base,
            task_type="SEQ_2_SEQ_LM" if isinstance(model, T5) else "CAUSAL_LM",
            tables=tables,
        )
    if not method.is_full:
        return save_adapter(model, folder, method=method, base_model_name_or_path=base, tables=tables)
    trained = Adapter(base, method, None, adapter_tensors(model))
    folder = output / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of this very run, killed before it was done
    return merge(checkpoint, trained, folder, dtype=_dtype_of(model), tokenizer=tokenizer, progress=progress)


def _dtype_of(model: Model) -> MergedDtype:
    """The run's compute type."""
    return cast(MergedDtype, jnp.dtype(model.head.weight.dtype).name)
