"""Saves what a run trained: the folder of an adapter, or after full fine-tuning that of a model.

<output>/adapter    PEFT's files, read back and compared, with qlora_jax.json, the tokenizer where it is needed, and the card
<output>/model      a Hugging Face folder in the dtype of the base (or of --save-dtype), with the card

Either is complete before it has its name.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from qlora_jax.adapters.bind import adapter_tensors, save_adapter
from qlora_jax.adapters.files import Adapter
from qlora_jax.checkpoint.tokenizer import save_tokenizer
from qlora_jax.checkpoint.whole_folder import TOKENIZER_FILES, whole_folder, writing_errors
from qlora_jax.export.merge import MergedDtype, merge
from qlora_jax.finetune.prepare import PreparedRun
from qlora_jax.finetune.training import TrainedRun
from qlora_jax.peft import FullFineTuning

__all__ = ["folder_of", "save_trained"]


_MODEL_FILES = frozenset({"config.json", "README.md", "model.safetensors", *TOKENIZER_FILES})


def folder_of(run: PreparedRun) -> Path:
    """Return the folder of the adapter of a run, or of its model."""
    return run.options.run.output / ("model" if run.method.is_full else "adapter")


def save_trained(trained: TrainedRun, write_card: Callable[[Path], None]) -> Path:
    """Save what was trained; return its folder.

    Args:
        trained: the run.
        write_card: writes the card into the folder that it is given.

    Raises:
        CheckpointError: the files could not be written.
    """
    run = trained.prepared
    folder = folder_of(run)
    with writing_errors(folder):
        if run.method.is_full:
            _save_model(trained, folder, write_card)
        else:
            _save_adapter(trained, folder, write_card)
    return folder


def _save_adapter(trained: TrainedRun, folder: Path, write_card: Callable[[Path], None]) -> None:
    run, resumed = trained.prepared, trained.prepared.pretrained.adapter
    own_tokenizer = resumed is not None and resumed.has_tokenizer
    other_template = run.options.data.chat_template is not None
    needs_tokenizer = run.method.trainable_tokens() or run.options.lora.special_tokens or own_tokenizer or other_template
    save_adapter(
        trained.model,
        folder,
        base_model_name_or_path=run.pretrained.base.name,
        resized_embeddings=None if resumed is None else resumed.resized_embeddings,
        subtracted=trained.subtracted,
        text_prefix=run.pretrained.checkpoint.text_prefix,
        metadata=run.adapter_metadata,
        beside=[*([partial(save_tokenizer, run.pretrained.tokenizer)] if needs_tokenizer else []), write_card],
    )


def _save_model(trained: TrainedRun, folder: Path, write_card: Callable[[Path], None]) -> None:
    run, model = trained.prepared, trained.model
    dtype = cast(FullFineTuning, run.method).save_dtype
    with whole_folder(folder, marker="config.json", own=_MODEL_FILES) as new:
        merge(
            run.pretrained.checkpoint,
            Adapter(run.pretrained.base.name, run.method, None, adapter_tensors(model)),
            new,
            dtype=None if dtype == "auto" else cast(MergedDtype, dtype),
            tokenizer=run.pretrained.tokenizer,
            progress=run.progress,
        )
        write_card(new)
