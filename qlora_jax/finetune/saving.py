"""Saves what a run trained: the folder of an adapter, or after full fine-tuning that of a model.

<output>/adapter    PEFT's files, read back and compared
<output>/model      a Hugging Face folder in the compute dtype of the run
"""

import shutil
from pathlib import Path
from typing import cast

import jax.numpy as jnp

from qlora_jax.adapters.bind import adapter_tensors, save_adapter
from qlora_jax.adapters.files import Adapter
from qlora_jax.export.merge import MergedDtype, merge
from qlora_jax.finetune.training import TrainedRun

__all__ = ["save_trained"]


def save_trained(trained: TrainedRun) -> Path:
    """Save what was trained; return its folder.

    Raises:
        CheckpointError: the files could not be written.
    """
    run, model, output = trained.prepared, trained.model, trained.prepared.options.run.output
    base, resumed = run.pretrained.base.name, run.pretrained.adapter
    if not run.method.is_full:
        return save_adapter(
            model,
            output / "adapter",
            base_model_name_or_path=base,
            resized_embeddings=None if resumed is None else resumed.resized_embeddings,
            subtracted=trained.subtracted,
            text_prefix=run.pretrained.checkpoint.text_prefix,
        )
    folder = output / "model"
    shutil.rmtree(folder, ignore_errors=True)  # left by this same run, if it was killed while it wrote
    return merge(
        run.pretrained.checkpoint,
        Adapter(base, run.method, None, adapter_tensors(model)),
        folder,
        dtype=cast(MergedDtype, jnp.dtype(model.head.weight.dtype).name),  # the compute dtype of the run
        tokenizer=run.pretrained.tokenizer,
        progress=run.progress,
    )
