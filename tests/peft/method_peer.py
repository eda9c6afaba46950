"""Tiny random models of transformers, PEFT's methods on them, and the same training on both sides."""

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
from qlora_jax.peft import Method
from qlora_jax.serve import generate, generate_seq2seq
from qlora_jax.train import adamw, create_state, jit_train_step, language_model_loss, seq2seq_loss, split

VOCABULARY = 61
STEPS = 10
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
T5_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' name, config
    "llama": ("Llama", DECODER),
    "qwen2": ("Qwen2", DECODER),
    "mistral": ("Mistral", DECODER | {"sliding_window": 5}),
    "gemma2": ("Gemma2", DECODER | {"head_dim": 8, "sliding_window": 5}),
    "gpt_neox": ("GPTNeoX", {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}),
    "t5": ("T5", T5_FIELDS),
}


class MethodPeer:
    """A random model of a family in a folder, for PEFT and for us."""

    def __init__(self, folder: Path, family: str, **config: Any) -> None:
        self.torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
        self.peft = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
        transformers = pytest.importorskip("transformers")
        name, fields = FAMILIES[family]
        self.folder, self.seq2seq = folder, family == "t5"
        self.task = "SEQ_2_SEQ_LM" if self.seq2seq else "CAUSAL_LM"
        self.kind = getattr(transformers, f"{name}ForConditionalGeneration" if self.seq2seq else f"{name}ForCausalLM")
        self.torch.manual_seed(0)
        model = self.kind(getattr(transformers, f"{name}Config")(**(fields | config)))
        with self.torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    table = any(part in name for part in ("embed", "lm_head", "shared", "bias"))
                    parameter.normal_(0.0, 0.2 if table else parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(0.2 * self.torch.randn(parameter.shape))
        model.save_pretrained(folder)

    def base(self) -> Any:
        return self.kind.from_pretrained(self.folder, dtype=self.torch.float32, attn_implementation="eager").eval()

    def adapted(self, kind: str, **fields: Any) -> Any:
        """PEFT's model with a fresh adapter; `kind` is the name of its configuration."""
        self.torch.manual_seed(1)
        return self.peft.get_peft_model(self.base(), getattr(self.peft, kind)(task_type=self.task, **fields))

    def random_adapter(self, folder: Path, kind: str, scale: float = 0.3, **fields: Any) -> Any:
        """PEFT's model with an adapter whose every parameter is random, which it saves."""
        model = self.adapted(kind, **fields)
        with self.torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(scale * self.torch.randn(parameter.shape))
        model.save_pretrained(folder)
        return model

    def loaded(self, folder: Path) -> Any:
        """PEFT's model with the adapter of a folder."""
        return self.peft.PeftModel.from_pretrained(self.base(), folder).eval()

    def ours(self, method: Method | None, **options: Any) -> Any:
        checkpoint = open_checkpoint(str(self.folder))
        return load_model(checkpoint, quantization=None, method=method, dtype=jnp.float32, progress=False, **options)

    def logits(self, model: Any, tokens: np.ndarray | None = None) -> np.ndarray:
        rows = self.torch.from_numpy(random_tokens() if tokens is None else tokens).long()
        with self.torch.no_grad():
            if self.seq2seq:
                return model.eval()(input_ids=rows, decoder_input_ids=rows).logits.numpy()
            return model.eval()(input_ids=rows).logits.numpy()

    def answers(self, model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Greedy answers, a prompt at a time.

        By PEFT's generate without a cache where that works: transformers 5.24 calls `cache` what PEFT 0.21 looks for as
        `past_key_values`, so that with a cache virtual tokens come before every new token again, and prefixes are dropped in
        any case. There each token comes from a forward pass of PEFT's model.
        """
        found, torch = [], self.torch
        prefix = model.peft_config["default"].peft_type == "PREFIX_TUNING"
        for prompt in prompts:
            rows = torch.tensor([prompt])
            with torch.no_grad():
                if not self.seq2seq and not prefix:
                    settings = {"max_new_tokens": count, "do_sample": False, "use_cache": False}
                    ids = model.eval().generate(input_ids=rows, attention_mask=torch.ones_like(rows), **settings)
                else:
                    ids = torch.zeros((1, 1), dtype=torch.long) if self.seq2seq else rows
                    for _ in range(count):
                        inputs = {"input_ids": rows, "decoder_input_ids": ids} if self.seq2seq else {"input_ids": ids}
                        ids = torch.cat([ids, model.eval()(**inputs).logits[:, -1:].argmax(-1)], 1)
            found.append(ids[0].tolist()[-count:])
        return found

    def losses(self, model: Any, data: list[dict[str, np.ndarray]], rate: float) -> list[float]:
        """The losses of PEFT's model while AdamW trains it."""
        model.train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        update, losses = self.torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0), []
        for batch in data:
            rows = {name: self.torch.from_numpy(value).long() for name, value in batch.items()}
            labels = self.torch.where(rows["loss_mask"] > 0, rows["targets"], -100)
            if self.seq2seq:
                logits = model(
                    input_ids=rows["sources"],
                    attention_mask=rows["source_mask"],
                    decoder_input_ids=rows["inputs"],
                ).logits
            else:
                logits = model(input_ids=rows["inputs"]).logits[:, -labels.shape[1] :]
            loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            update.step()
            update.zero_grad()
            losses.append(loss.item())
        return losses


def our_losses(model: Model, data: list[dict[str, np.ndarray]], rate: float) -> tuple[list[float], Any]:
    """The same of our model, and the model that comes out."""
    graph, adapter, frozen = split(model)
    tx = adamw(rate, max_grad_norm=None)
    state = create_state(tx, jax.tree.map(jnp.copy, adapter))  # which it takes over
    loss = seq2seq_loss if isinstance(model, T5) else language_model_loss
    step, losses = jit_train_step(graph, tx, loss, state), []
    for batch in data:
        state, metrics = step(state, frozen, {name: jnp.asarray(value)[None] for name, value in batch.items()})
        losses.append(float(metrics["loss"]))
    return losses, nnx.merge(graph, state.adapter, frozen)


def random_batches(seq2seq: bool, steps: int = STEPS, length: int = 12) -> list[dict[str, np.ndarray]]:
    draws, found = np.random.default_rng(3), []
    for _ in range(steps):
        tokens = draws.integers(1, VOCABULARY, (2, length + 1), np.int32)
        columns = np.arange(length)[None]
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        batch["loss_mask"] = np.repeat((columns > 2).astype(np.float32), 2, 0)
        if seq2seq:
            batch["sources"] = draws.integers(1, VOCABULARY, (2, length), np.int32)
            batch["source_mask"] = columns < np.asarray([[length], [length - 4]])
        found.append(batch)
    return found


def random_tokens(length: int = 17) -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCABULARY, (2, length), np.int32)


def our_answers(model: Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    graph, state = nnx.split(model)
    return (generate_seq2seq if isinstance(model, T5) else generate)(graph, state, prompts, max_new_tokens=count)


def randomised(model: Model, scale: float = 0.3) -> Any:
    """The model with noise on all that is trained, in the padding as well."""
    graph, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved), frozen)


@partial(jax.jit, static_argnums=0)
def _forward(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    return model(tokens, tokens) if isinstance(model, T5) else model(tokens)


def run(model: Model, tokens: np.ndarray | None = None) -> np.ndarray:
    """The logits of `random_tokens`, or of others."""
    return np.asarray(_forward(*nnx.split(model), jnp.asarray(random_tokens() if tokens is None else tokens)))


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())
