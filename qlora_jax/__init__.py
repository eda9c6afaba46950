"""QLoRA in pure JAX + Flax NNX: fine-tune large language models whose frozen weights are stored in 4 bits.

from_pretrained, save_pretrained, merge, finetune     whole tasks, each in one call
open_checkpoint, load_model, load_tokenizer           a model and its tokenizer in steps
load_adapter, save_adapter, read_adapter_config …     adapters in PEFT's format
split, create_state, jit_train_step, …_loss           the training step, for a loop of one's own
generate, generate_seq2seq, Sampling                  text from a model
Linear, LoRA, quantize, dequantize, matmul            the layers and functions alone
"""

import importlib
from typing import TYPE_CHECKING, Any

from qlora_jax.platforms import quiet_start

if TYPE_CHECKING:
    from qlora_jax.adapters.bind import load_adapter, save_adapter
    from qlora_jax.adapters.peft_config import AdapterConfig, read_adapter_config, read_adapter_method
    from qlora_jax.api import from_pretrained, merge, save_pretrained
    from qlora_jax.checkpoint.load import load_model
    from qlora_jax.checkpoint.open import open_checkpoint
    from qlora_jax.checkpoint.tokenizer import load_tokenizer
    from qlora_jax.errors import CheckpointError, QLoRAError
    from qlora_jax.finetune import Options, finetune
    from qlora_jax.models import T5, CausalLM, DecoderConfig, T5Config
    from qlora_jax.nn import Linear
    from qlora_jax.peft import LoRA
    from qlora_jax.quant import Quantization, QuantizedTensor, dequantize, matmul, quantize
    from qlora_jax.serve import Sampling, generate, generate_seq2seq
    from qlora_jax.train import (
        TrainState,
        adamw,
        create_state,
        host_offload,
        jit_eval_step,
        jit_train_step,
        language_model_loss,
        seq2seq_loss,
        split,
        train_step,
    )

quiet_start()  # before JAX and transformers are imported, which read the environment then

__version__ = "0.1.0"

__all__ = [
    "T5",
    "AdapterConfig",
    "CausalLM",
    "CheckpointError",
    "DecoderConfig",
    "Linear",
    "LoRA",
    "Options",
    "QLoRAError",
    "Quantization",
    "QuantizedTensor",
    "Sampling",
    "T5Config",
    "TrainState",
    "adamw",
    "create_state",
    "dequantize",
    "finetune",
    "from_pretrained",
    "generate",
    "generate_seq2seq",
    "host_offload",
    "jit_eval_step",
    "jit_train_step",
    "language_model_loss",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "matmul",
    "merge",
    "open_checkpoint",
    "quantize",
    "read_adapter_config",
    "read_adapter_method",
    "save_adapter",
    "save_pretrained",
    "seq2seq_loss",
    "split",
    "train_step",
]

# The module of each name. It is imported when the name is used: that takes seconds, and a command handles signals before.
_MODULES = {
    "adapters.bind": ("load_adapter", "save_adapter"),
    "adapters.peft_config": ("AdapterConfig", "read_adapter_config", "read_adapter_method"),
    "api": ("from_pretrained", "merge", "save_pretrained"),
    "checkpoint.load": ("load_model",),
    "checkpoint.open": ("open_checkpoint",),
    "checkpoint.tokenizer": ("load_tokenizer",),
    "errors": ("CheckpointError", "QLoRAError"),
    "models": ("T5", "CausalLM", "DecoderConfig", "T5Config"),
    "nn": ("Linear",),
    "peft": ("LoRA",),
    "quant": ("Quantization", "QuantizedTensor", "dequantize", "matmul", "quantize"),
    "serve": ("Sampling", "generate", "generate_seq2seq"),
    "train": (
        "TrainState",
        "adamw",
        "create_state",
        "host_offload",
        "jit_eval_step",
        "jit_train_step",
        "language_model_loss",
        "seq2seq_loss",
        "split",
        "train_step",
    ),
    "finetune": ("Options",),
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is used."""
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"qlora_jax.{module}"), name)
            globals()[name] = value
            return value
    try:
        # Importing a module makes it an attribute of the package. `finetune` is a module that can be called; see there.
        return importlib.import_module(f"qlora_jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"qlora_jax.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
