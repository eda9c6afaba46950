"""Tiny random models of transformers with PEFT's adapters on them, to compare with."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.models import T5, Model
from qlora_jax.peft import LoRA

VOCABULARY = 61
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' name, config
    "llama": ("Llama", DECODER | {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", DECODER | {"num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoX", DECODER),
    "t5": (
        "T5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 3,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}


class Peer:
    """A random model of a family in a folder, for PEFT and for us to put adapters on."""

    def __init__(self, folder: Path, family: str, **config: Any) -> None:
        self.torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
        self.peft = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
        transformers = pytest.importorskip("transformers")
        name, fields = FAMILIES[family]
        self.folder, self.encoder_decoder = folder, family == "t5"
        self.kind = getattr(transformers, f"{name}ForConditionalGeneration" if family == "t5" else f"{name}ForCausalLM")
        self.torch.manual_seed(0)
        model = self.kind(getattr(transformers, f"{name}Config")(**(fields | config)))
        with self.torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    table = any(part in name for part in ("embed", "lm_head", "shared", "bias"))
                    parameter.normal_(0.0, 0.5 if table else parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(0.2 * self.torch.randn(parameter.shape))
        model.save_pretrained(folder)

    def base(self) -> Any:
        return self.kind.from_pretrained(self.folder, dtype=self.torch.float32).eval()

    def adapted(self, **fields: Any) -> Any:
        """PEFT's model with a fresh adapter; "all-linear" where the fields name no targets."""
        task = "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM"
        defaults = {"r": 4, "lora_alpha": 6, "task_type": task, "target_modules": "all-linear"}
        return self.peft.get_peft_model(self.base(), self.peft.LoraConfig(**(defaults | fields)))

    def random_adapter(self, folder: Path, **fields: Any) -> Any:
        """PEFT's model with an adapter whose every parameter is random, which it saves."""
        model = self.adapted(**fields)
        with self.torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * self.torch.randn(parameter.shape))
        model.save_pretrained(folder)
        return model

    def ours(self, lora: LoRA | None) -> Model:
        checkpoint = open_checkpoint(str(self.folder))
        return load_model(checkpoint, quantization=None, method=lora, dtype=jnp.float32, progress=False)

    def logits(self, model: Any) -> np.ndarray:
        tokens = self.torch.from_numpy(random_tokens()).long()
        with self.torch.no_grad():
            if self.encoder_decoder:
                return model.eval()(input_ids=tokens, decoder_input_ids=tokens).logits.numpy()
            return model.eval()(tokens).logits.numpy()


def random_tokens(length: int = 17) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, length), np.int32)


def randomised(model: Model, scale: float = 0.2) -> Any:
    """The model with noise on all that is trained, in the padding as well."""
    graph, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved), frozen)


# Optimised, as users run it: without, sums are rounded otherwise, and the bounds of those who compare are for this. The
# lowest level gives the bits of the highest. With XLA's newer code generator, where conftest.py has the choice, it compiles
# fastest.
OPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 1}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True


@partial(jax.jit, static_argnums=0, compiler_options=OPTIMISED)
def _forward(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    return model(tokens, tokens) if isinstance(model, T5) else model(tokens)


def run(model: Model) -> np.ndarray:
    """The logits of `random_tokens`."""
    return np.asarray(_forward(*nnx.split(model), jnp.asarray(random_tokens())))


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())
