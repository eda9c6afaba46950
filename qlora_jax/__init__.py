"""QLoRA in pure JAX + Flax: fine-tune large language models whose frozen weights lie in 4 bits."""

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter_config
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError
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

__version__ = "0.1.0"

__all__ = [
    "T5",
    "CausalLM",
    "CheckpointError",
    "DecoderConfig",
    "Linear",
    "LoRA",
    "Quantization",
    "QuantizedTensor",
    "Sampling",
    "T5Config",
    "TrainState",
    "adamw",
    "create_state",
    "dequantize",
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
    "open_checkpoint",
    "quantize",
    "read_adapter_config",
    "save_adapter",
    "seq2seq_loss",
    "split",
    "train_step",
]
