"""A real model on real texts against transformers: dense in float32, and in NF4 against what bitsandbytes dequantises."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError
from qlora_jax.quant import Quantization

torch = pytest.importorskip("torch", reason="the peers (torch, transformers' models) are not installed")
DATA = Path(__file__).parents[3] / "shared" / "data"
SOURCES = {"oasst_guanaco": "text", "code_alpaca": "output", "gsm8k": "answer", "vicuna_questions": "text"}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    try:
        opened = open_checkpoint(str(fetch_default_model()))
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")

    def read(name: str) -> np.ndarray:  # rounded as 16-bit checkpoints are
        return np.array(jnp.asarray(opened.read(name), jnp.bfloat16).astype(jnp.float32))

    return Checkpoint(opened.name, opened.config, opened.shapes, read)


@pytest.fixture(scope="module")
def texts(checkpoint: Checkpoint) -> list[np.ndarray]:
    """20 texts of at most 128 tokens: conversations in many languages, code, mathematics, questions."""
    if not DATA.is_dir():
        pytest.skip(f"the shared data are not here: {DATA}")
    tokenizer = load_tokenizer(checkpoint.name)
    rows = []
    for name, column in SOURCES.items():
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:5]
        rows += [np.array(tokenizer(json.loads(line)[column])["input_ids"][:128], np.int32) for line in lines]
    assert len(rows) == 20
    return rows


@pytest.fixture(scope="module", params=["dense", "nf4"])
def models(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> tuple[Any, Any]:
    """(our logits of a row of tokens, those of transformers)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.shapes}
    if request.param == "nf4":
        functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
        for name in [name for name in weights if "_proj" in name]:
            packed, state = functional.quantize_4bit(weights[name], blocksize=64, quant_type="nf4", compress_statistics=True)
            weights[name] = functional.dequantize_4bit(packed, state)
    peer = LlamaForCausalLM(LlamaConfig(**{**checkpoint.config, "dtype": "float32"})).eval()
    peer.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    quantization = None if request.param == "dense" else Quantization()
    graph, state = nnx.split(load_model(checkpoint, quantization=quantization, dtype=jnp.float32, progress=False))
    # Of a real model running takes the time, not compiling.
    optimised = {"xla_backend_optimization_level": 3}
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens), compiler_options=optimised)

    def ours(tokens: np.ndarray) -> np.ndarray:
        padded = np.zeros((1, 128), np.int32)  # one shape to compile; padding on the right changes nothing
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(state, padded))[0, : len(tokens)]

    def theirs(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return peer(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()

    return ours, theirs


@pytest.mark.usefixtures("compiled_as_for_users")
@pytest.mark.integration
def test_logits_and_losses_equal_transformers(models: tuple[Any, Any], texts: list[np.ndarray]) -> None:
    ours, theirs = models

    def loss(logits: np.ndarray, tokens: np.ndarray) -> float:
        shares = jax.nn.log_softmax(jnp.asarray(logits[:-1]))
        return -float(shares[np.arange(len(tokens) - 1), tokens[1:]].mean())

    pairs = [(ours(tokens), theirs(tokens)) for tokens in texts]
    difference = max(float(np.abs(mine - other).max()) for mine, other in pairs)
    mine, other = (np.mean([loss(pair[side], tokens) for pair, tokens in zip(pairs, texts, strict=True)]) for side in (0, 1))
    print(f"largest difference of logits {difference:.2e}; mean loss {mine:.6f} here, {other:.6f} there")
    assert difference < 1e-3
    assert abs(mine - other) < 1e-3
