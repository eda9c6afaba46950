"""LoRA+ (Hayou et al. 2024): a higher learning rate for B than for A.

    learning rate of A = lr        of B = ratio * lr

The rule is that of PEFT's `create_loraplus_optimizer`: parameters with one axis (norms, DoRA's magnitudes) have the rate of
B, embeddings and their rows that of A. (PEFT's separate rate of embeddings is for LoRA on an embedding, which does not exist
here.) Every update is proportional to the learning rate, weight decay included, so the ratio is a factor on the update of
any rule.
"""

from typing import Any

import jax

B = "lora_b"  # the name of B among the parameters


def rates(params: Any, ratio: float) -> list[float]:
    """Return the factor on the learning rate of each leaf, in the order of the leaves; `params` may be shapes."""
    return [ratio if _is_fast(path, leaf.ndim) else 1.0 for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _is_fast(path: Any, axes: int) -> bool:
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return B in names or axes - ("layers" in names) == 1  # stacks of layers have one more axis
