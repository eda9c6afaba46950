"""The array types in the signatures of quant, nn, models and train, checked at run time with jaxtyping and beartype.

Each function is called with arguments of the right shapes and dtypes, which must pass, and with one wrong argument, which
must raise. The right call also checks the shape and the dtype of the result.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from flax import nnx
from jaxtyping import TypeCheckError, jaxtyped

from qlora_jax import nn, quant
from qlora_jax.models import T5, CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.models.neftune import neftune_noise
from qlora_jax.models.t5_config import t5_config
from qlora_jax.train.cross_entropy import chunked_cross_entropy


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


def tokens(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.int32)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its annotations checked in each call."""
    return jaxtyped(typechecker=beartype)(inspect.unwrap(function))


PACKED = quant.quantize(array(64, 8))
HEAD = quant.quantize_embedding(array(16, 64), "int8")
BLOCKS, SCALES = quant.to_blocks(PACKED)
MASK = jnp.ones((2, 3, 5), bool)
QUERIES, KEYS = array(2, 3, 4, 8), array(2, 3, 2, 8)
ROPE = nn.RotaryEmbedding(8, 10000.0, 64)

# (name, function, right arguments, index or name of the argument to replace, wrong values for it)
CASES: list[tuple[str, Any, tuple[Any, ...], dict[str, Any], int | str, list[Any]]] = [
    ("quantize", quant.quantize, (array(64, 8),), {}, 0, [array(64), tokens(64, 8)]),
    ("dequantize", quant.dequantize, (PACKED,), {}, 0, [array(64, 8)]),
    ("matmul", quant.matmul, (array(2, 3, 64), PACKED), {}, 0, [tokens(2, 64)]),
    ("matmul, dense", quant.matmul, (array(3, 64), array(64, 8)), {}, 1, [array(32, 8), array(64), tokens(64, 8)]),
    ("quantize_embedding", quant.quantize_embedding, (array(16, 64), "int8"), {}, 0, [array(16), tokens(16, 64)]),
    ("embedding_lookup", quant.embedding_lookup, (HEAD, tokens(2, 3)), {}, 1, [array(2, 3)]),
    ("embedding_matmul", quant.embedding_matmul, (array(3, 64), HEAD, "float32"), {}, 0, [array(64), tokens(3, 64)]),
    ("embedding_rows_sum", quant.embedding_rows_sum, (array(3, 16), HEAD, "float32"), {}, 0, [array(16)]),
    (
        "from_blocks",
        quant.from_blocks,
        (BLOCKS, SCALES, PACKED.scale_absmax, PACKED.scale_offset),
        {"shape": (64, 8), "data_type": "nf4", "block_size": 64, "dtype": "float32"},
        0,
        [BLOCKS.astype(jnp.int32), BLOCKS[None]],
    ),
    ("to_blocks", quant.to_blocks, (PACKED,), {}, 0, [array(64, 8)]),
    ("quantize_blockwise", quant.quantize_blockwise, (array(3, 5),), {"signed": True}, 0, [tokens(3, 5)]),
    ("activate", nn.activate, ("silu", array(3, 5)), {}, 1, [tokens(3, 5)]),
    ("glu", nn.glu, ("silu", array(3, 5), array(3, 5)), {}, 2, [array(5), tokens(3, 5)]),
    ("causal_attention", nn.causal_attention, (QUERIES, KEYS, KEYS), {}, 1, [array(2, 5, 2, 8), array(2, 3, 2, 4), KEYS[0]]),
    (
        "causal_attention, segments",
        nn.causal_attention,
        (QUERIES, KEYS, KEYS),
        {"segment_ids": tokens(2, 3)},
        "segment_ids",
        [tokens(3, 2), array(2, 3)],
    ),
    ("with_prefix", nn.with_prefix, (QUERIES, KEYS, KEYS, (array(5, 2, 8), array(5, 2, 8))), {}, 3, [(KEYS, KEYS)]),
    (
        "biased_attention",
        nn.biased_attention,
        (QUERIES, array(2, 5, 2, 8), array(2, 5, 2, 8), MASK[:1], array(4, 3, 5)),
        {"scale": 1.0},
        4,
        [array(4, 5, 3), array(4, 3, 5, dtype=jnp.bfloat16)],
    ),
    (
        "cached_attention",
        nn.cached_attention,
        (QUERIES, array(2, 2, 5, 8), array(2, 2, 5, 8), lambda queries: MASK[:, queries]),
        {},
        2,
        [array(2, 2, 5, 4), array(2, 5, 2, 8), array(2, 5, 8)],
    ),
    (
        "shifted_group_attention",
        nn.shifted_group_attention,
        (array(2, 8, 4, 8), array(2, 8, 2, 8), array(2, 8, 2, 8), 2),
        {},
        2,
        [array(2, 8, 2, 4)],
    ),
    (
        "relative_position_bias",
        nn.relative_position_bias,
        (array(8, 4), tokens(3), tokens(5)),
        {"bidirectional": True, "max_distance": 16},
        1,
        [tokens(3, 1), array(3)],
    ),
    ("rotate", nn.rotate, (QUERIES, array(2, 3, 4), array(2, 3, 4)), {}, 2, [array(2, 3, 3), array(3, 4)]),
    ("RotaryEmbedding", nn.RotaryEmbedding.__call__, (ROPE, tokens(2, 3)), {}, 1, [tokens(3), array(2, 3)]),
    ("checkpoint_name", nn.checkpoint_name, (array(2), "residual"), {}, 0, [None]),
    ("add_delta", nn.add_delta, (array(3, 5, dtype=jnp.bfloat16), array(3, 5)), {}, 1, [array(5), tokens(3, 5)]),
    (
        "chunked_cross_entropy",
        chunked_cross_entropy,
        (array(6, 8), array(16, 8), tokens(6), array(6), 4),
        {},
        2,
        [tokens(5), array(6)],
    ),
    ("neftune_noise", neftune_noise, (array(2, 3, 8), tokens(2, 3), 5.0, jax.random.key(0)), {}, 1, [tokens(2, 4)]),
]


@pytest.mark.parametrize(("name", "function", "arguments", "options", "which", "wrong"), CASES, ids=[c[0] for c in CASES])
def test_functions(
    name: str, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], which: int | str, wrong: list[Any]
) -> None:
    call = checked(function)
    call(*arguments, **options)
    for value in wrong:
        changed, named = list(arguments), dict(options)
        if isinstance(which, str):
            named[which] = value
        else:
            changed[which] = value
        with pytest.raises(TypeCheckError):
            call(*changed, **named)


def test_layers() -> None:
    rngs = nnx.Rngs(0)
    embedding = nn.Embedding(16, 8, rows=(1, 2), rngs=rngs)
    for method, layer, right, wrong in (
        (nn.Linear.__call__, nn.Linear(8, 4, use_bias=True, rngs=rngs), array(2, 3, 8), tokens(2, 8)),
        (nn.Linear.base, nn.Linear(8, 4, rngs=rngs), array(8), tokens(8)),
        (nn.RMSNorm.__call__, nn.RMSNorm(8, eps=1e-6), array(2, 8), tokens(2, 8)),
        (nn.LayerNorm.__call__, nn.LayerNorm(8, eps=1e-6), array(2, 8), tokens(2, 8)),
        (nn.Embedding.__call__, embedding, tokens(2, 3), array(2, 3)),
        (nn.Embedding.logits, embedding, array(2, 3, 8), tokens(2, 8)),
        (nn.VocabularyMatrix.weighted_sums, embedding.matrix, array(3, 16), array(16)),
    ):
        checked(method)(layer, right)
        with pytest.raises(TypeCheckError):
            checked(method)(layer, wrong)


def test_models() -> None:
    """Under `eval_shape`, so that only shapes and dtypes are computed."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    t5_sizes = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    decoder = nnx.eval_shape(lambda: CausalLM(llama_config(sizes), rngs=nnx.Rngs(0)))
    t5 = nnx.eval_shape(lambda: T5(t5_config(t5_sizes), rngs=nnx.Rngs(0)))

    def run(model: Any, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        graph, state = nnx.split(model)
        call = checked(method)
        return jax.eval_shape(lambda state: call(nnx.merge(graph, state), *arguments, **options), state)

    assert run(decoder, CausalLM.__call__, tokens(2, 3), segment_ids=tokens(2, 3)).shape == (2, 3, 32)
    assert run(decoder, CausalLM.hidden, tokens(2, 3), positions=tokens(2, 3)).shape == (2, 3, 16)
    assert run(t5, T5.__call__, tokens(2, 5), tokens(2, 3), source_mask=tokens(2, 5)).shape == (2, 3, 32)
    assert run(t5, T5.hidden, tokens(2, 3), array(2, 5, 16)).shape == (2, 3, 16)
    for model, method, arguments, options in (
        (decoder, CausalLM.__call__, (array(2, 3),), {}),
        (decoder, CausalLM.hidden, (tokens(2, 3),), {"segment_ids": tokens(3, 2)}),
        (decoder, CausalLM.logits, (tokens(2, 16),), {}),
        (t5, T5.encode, (tokens(2, 5),), {"source_mask": tokens(2, 3)}),
        (t5, T5.hidden, (tokens(2, 3), array(3, 5, 16)), {}),
    ):
        with pytest.raises(TypeCheckError):
            run(model, method, *arguments, **options)
