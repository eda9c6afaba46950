"""Saves what a run trained: the folder of an adapter, or after full fine-tuning that of a model.

<output>/adapter    PEFT's files, read back and compared
<output>/model      a Hugging Face folder in the compute dtype of the run
"""

import shutil
from pathlib import Path
from typing import cast

import jax.numpy as jnp
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.bind import adapter_tensors, save_adapter
from qlora_jax.adapters.files import Adapter
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.export.merge import MergedDtype, merge
from qlora_jax.models import Model
from qlora_jax.peft import FullFineTuning, Subtracted


def save_trained(
    model: Model,
    output: Path,
    *,
    base: str,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast | None,
    resume_adapter: Adapter | None,
    subtracted: Subtracted | None,
    progress: bool,
) -> Path:
    """Save what was trained; return its folder.

    Args:
        output: the folder of the run.
        base: path or repository id of the base, by which PEFT finds it.
        checkpoint: the base, into which a model's trained values are merged.
        tokenizer: written beside a model; None: no tokenizer.
        resume_adapter: the adapter that the run continued from; None: a new one.
        subtracted: what was subtracted from the base before it was stored; None: nothing.

    Raises:
        CheckpointError: the files could not be written.
    """
    if not isinstance(model.method, FullFineTuning):
        return save_adapter(
            model,
            output / "adapter",
            base_model_name_or_path=base,
            resized_embeddings=None if resume_adapter is None else resume_adapter.resized_embeddings,
            subtracted=subtracted,
        )
    trained = Adapter(base, model.method, None, adapter_tensors(model))
    folder = output / "model"
    shutil.rmtree(folder, ignore_errors=True)  # left by this same run, if it was killed while it wrote
    return merge(checkpoint, trained, folder, dtype=_dtype_of(model), tokenizer=tokenizer, progress=progress)


def _dtype_of(model: Model) -> MergedDtype:
    """Return the compute dtype of the run."""
    return cast(MergedDtype, jnp.dtype(model.head.weight.dtype).name)
