"""Bytes of trees of shapes, on each device."""

import math
from typing import Any

import jax

from qlora_jax.quant import PackedEmbedding


def weight_bytes(frozen: Any) -> tuple[int, int]:
    """Return (bytes of quantised matrices and embeddings, bytes of everything else) of a frozen tree, on each device."""
    leaves = jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, PackedEmbedding))
    packed = sum(tree_bytes(leaf) for leaf in leaves if isinstance(leaf, PackedEmbedding))
    return packed, tree_bytes(frozen) - packed


def tree_bytes(tree: Any) -> int:
    """Return the bytes of a tree of shapes; on each device, if the shapes have shardings."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
