"""LoRA+ (Hayou et al. 2024): B learns faster than A.

    learning rate of A = lr        of B = ratio * lr

The same rule as PEFT's `create_loraplus_optimizer`: what has one axis (a norm that trains as a whole, DoRA's magnitudes)
goes with B, token tables and their rows with A. (The separate rate of embeddings there is for LoRA on a token table, of
which there is none here.) An update is the learning rate times something, weight decay included, so the ratio is a factor on
the update, whatever the rule that made it.
"""

from typing import Any

import jax

B = "lora_b"  # the name of B among the parameters


def rates(params: Any, ratio: float) -> list[float]:
    """The factor on the learning rate of each leaf, in the order of the leaves; `params` may be abstract."""
    return [ratio if _is_fast(path, leaf.ndim) else 1.0 for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _is_fast(path: Any, axes: int) -> bool:
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return B in names or axes - ("layers" in names) == 1  # stacks of layers have an axis more
