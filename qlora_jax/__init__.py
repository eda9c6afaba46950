"""QLoRA in pure JAX + Flax NNX: fine-tune large language models whose frozen weights are stored in 4 bits.

from_pretrained, save_pretrained, merge, finetune     whole tasks, each in one call
open_checkpoint, load_model, load_tokenizer           a model and its tokenizer in steps
load_adapter, save_adapter, read_adapter_config …     adapters in PEFT's format
split, create_state, jit_train_step, …_loss           the training step, for a loop of one's own
generate, generate_seq2seq, Sampling                  text from a model
Linear, LoRA, quantize, dequantize, matmul            the layers and functions alone
"""

from typing import TYPE_CHECKING, Any

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.peft_config import AdapterConfig, read_adapter_config, read_adapter_method
from qlora_jax.api import from_pretrained, merge, save_pretrained
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError, QLoRAError
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

if TYPE_CHECKING:
    from qlora_jax.finetune import Options, finetune

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


def __getattr__(name: str) -> Any:
    """Import the training job when it is used: it needs packages that take seconds to import."""
    if name in ("Options", "finetune"):
        import importlib

        # `qlora_jax.finetune` is a package that can be called; see there.
        package = importlib.import_module("qlora_jax.finetune")
        return package if name == "finetune" else package.Options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
