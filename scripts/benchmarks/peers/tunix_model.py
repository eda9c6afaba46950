"""Build Tunix' Llama with NF4 weights and LoRA on all linear layers, as its command line does, for the Qwix workers.

Qwix quantises in tiles of 64, with one float32 scale per tile, and has no double quantisation. Tunix' trainer computes whole
logits and a one-hot target of the same size in float32. Its Llama (0.1.7) always uses a rotary theta of 1,000,000 and no
scaling, whatever its config says: the work is the same as that of the other programs, but the losses differ.
"""

from typing import Any

import jax.numpy as jnp
import optax
import qwix  # type: ignore
from flax import nnx
from tunix.models.llama3 import model as llama  # type: ignore
from tunix.sft import peft_trainer  # type: ignore

LINEAR = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TILE = 64


def config_of(config: dict[str, Any], remat: str) -> llama.ModelConfig:
    """Return Tunix' config for a Hugging Face config.json; `remat` is none, block or decoder."""
    if config["model_type"] != "llama":
        raise SystemExit(f"expected a Llama model, found {config['model_type']}")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if head_dim % TILE:  # a tile of the output projection must be within one head
        raise SystemExit(f"expected heads of a multiple of {TILE}, found {head_dim}")
    return llama.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=heads,
        head_dim=head_dim,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        rope_theta=(config.get("rope_parameters") or config).get("rope_theta", 10000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        weight_tying=config.get("tie_word_embeddings", False),
        remat_config=getattr(llama.RematConfig, remat.upper()),
    )


def with_adapter(model: Any, rank: int) -> Any:
    """Return the quantised model with its adapter."""
    provider = qwix.LoraProvider(module_path=LINEAR, rank=rank, alpha=16.0, weight_qtype="nf4", tile_size=TILE)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def trainer(model: Any) -> peft_trainer.PeftTrainer:
    """Return Tunix' trainer with the optimizer of the other programs."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(2e-4, weight_decay=0.0))
    never = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    return peft_trainer.PeftTrainer(model, optimizer, never)


def batch_of(tokens: Any, mask: Any) -> dict[str, Any]:
    """Return the inputs of the trainer's loss for tokens `[b, t]` and a mask of ones."""
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), jnp.bool_))
    return {
        "input_tokens": tokens,
        "input_mask": mask,
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape),
        "attention_mask": jnp.broadcast_to(causal, (tokens.shape[0], length, length)),
    }
