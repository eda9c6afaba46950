"""The losses of language models, as sums over the learned tokens of a batch.

    hidden = model.hidden(inputs)                       [b, t, d]
    loss   = -Σ loss_mask · log π(target | inputs)      [b, t] in chunks over the vocabulary (train.cross_entropy)

`token_log_probabilities` returns the terms of that sum one by one, for objectives that combine them otherwise, as preference
and policy-gradient objectives do. Each device works on its own rows of the batch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qlora_jax.nn import VocabularyMatrix
from qlora_jax.nn.mesh import weight_shards
from qlora_jax.nn.parallel import HEAD_AXES, over_rows
from qlora_jax.train.cross_entropy import Axes, token_losses, token_losses_and_hits

Batch = Mapping[str, Array]


def language_model_loss(
    model: Any,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    neftune_alpha: float = 0.0,
    attention_groups: int = 1,
) -> Float[Array, ""]:
    """Return the summed cross-entropy of a batch over its learned tokens, float32.

    Args:
        model: anything with `hidden(tokens, positions=, segment_ids=, key=)`, `head` and `logit_cap`.
        batch: `inputs`, `targets`, `loss_mask`, each `[b, t]`; `positions` and `segment_ids` where documents are packed.
        key: the random key of dropout and NEFTune; None turns both off.
        neftune_alpha: the noise on the embeddings, for models whose `hidden` takes that argument; 0 for none.
        attention_groups: the groups of LongLoRA's attention, for models whose `hidden` takes that argument; 1 for dense
            attention.
    """
    more: dict[str, Any] = {"neftune_alpha": neftune_alpha} if neftune_alpha else {}
    more |= {"attention_groups": attention_groups} if attention_groups > 1 else {}
    hidden = decoder_hidden(model, batch, key, **more)
    return row_losses(model, hidden, batch["targets"], batch["loss_mask"]).sum()


def seq2seq_loss(model: Any, batch: Batch, key: PRNGKeyArray | None) -> Float[Array, ""]:
    """Return the summed cross-entropy of an encoder-decoder over the learned tokens of its targets, float32.

    Args:
        model: anything with `encode(sources, source_mask, key=)`, `hidden(inputs, encoded, source_mask, key=)`, `head` and
            `logit_cap`.
        batch: `sources` and `source_mask` `[b, s]`; `inputs` (the targets shifted right), `targets`, `loss_mask` `[b, t]`.
        key: the random key of dropout; None turns it off.
    """
    return row_losses(model, _seq2seq_hidden(model, batch, key), batch["targets"], batch["loss_mask"]).sum()


def language_model_metrics(
    model: Any, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return `language_model_loss` of held-out data, and the sum of `mean_token_accuracy` over its learned tokens.

    TRL reports the accuracy by this name: a token counts 1 if the model gives it the highest of all logits.
    """
    return _loss_and_accuracy(model, decoder_hidden(model, batch, key), batch)


def seq2seq_metrics(
    model: Any, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return `seq2seq_loss` of held-out data, and the sum of `mean_token_accuracy` over its learned tokens."""
    return _loss_and_accuracy(model, _seq2seq_hidden(model, batch, None), batch)


def token_log_probabilities(model: Any, batch: Batch, key: PRNGKeyArray | None = None) -> Float[Array, "b t"]:
    """Return the log-probability of each learned target given the tokens before it, float32; 0 for the other targets.

    The result can be differentiated with respect to the model's adapter. No more than a chunk of logits exists at a time.

    Args:
        model: a decoder, as `language_model_loss` takes it.
        batch: `inputs`, `targets`, `loss_mask`, each `[b, t]`; `positions` and `segment_ids` where documents are packed.
            Each log-probability is multiplied by its `loss_mask`.
        key: the random key of dropout; None turns it off.
    """
    return -_losses_of_tokens(model, decoder_hidden(model, batch, key), batch["targets"], batch["loss_mask"])


def row_losses(
    model: Any, hidden: Float[Array, "b t d"], targets: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> Float[Array, " b"]:
    """Return the weighted cross-entropy of each row, summed over its tokens, float32."""
    return _losses_of_tokens(model, hidden, targets, weights).sum(1)


def decoder_hidden(model: Any, batch: Batch, key: Array | None, **more: Any) -> Array:
    """Return the hidden states of a batch, whose rows may have `adapter_ids`, the slots of a bank of adapters."""
    more |= {"adapter_ids": batch["adapter_ids"]} if "adapter_ids" in batch else {}
    return model.hidden(
        batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"), key=key, **more
    )


def _seq2seq_hidden(model: Any, batch: Batch, key: Array | None) -> Array:
    keys = (None, None) if key is None else jax.random.split(key)
    encoded = model.encode(batch["sources"], batch["source_mask"], key=keys[0])
    return model.hidden(batch["inputs"], encoded, batch["source_mask"], key=keys[1])


def _losses_of_tokens(model: Any, hidden: Array, targets: Array, weights: Array) -> Array:
    """Return the weighted cross-entropy of each token, float32 `[b, t]`."""

    def losses(head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, axes: Axes) -> Array:
        flat = hidden.reshape(-1, hidden.shape[-1])
        each = token_losses(flat, head, targets.reshape(-1), weights.reshape(-1), None, model.logit_cap, axes)
        return each.reshape(targets.shape)

    return _over_rows_with_head(model.head, losses, hidden, targets, weights)


def _loss_and_accuracy(model: Any, hidden: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Return (summed loss, other sums); neither is to be differentiated."""

    def sums_of_rows(head: VocabularyMatrix, hidden: Array, targets: Array, weights: Array, axes: Axes) -> Array:
        flat = (hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), weights.reshape(-1))
        return token_losses_and_hits(*flat, model.logit_cap, axes).reshape(*targets.shape, 2).sum(1)

    sums = _over_rows_with_head(model.head, sums_of_rows, hidden, batch["targets"], batch["loss_mask"]).sum(0)
    return sums[0], {"mean_token_accuracy": sums[1]}


def _over_rows_with_head(head: Any, function: Callable[..., Array], *arrays: Array) -> Array:
    """Return `function(head, *arrays, axes)`, with the rows of the arrays spread over the devices.

    The rows of the head are spread too where their number allows it and no change of the head trains.
    """
    shards = weight_shards()
    head = head if isinstance(head, VocabularyMatrix) else VocabularyMatrix(head)
    trains = head.delta is not None or head.low_rank is not None
    axes = HEAD_AXES if shards > 1 and not trains and head.shape[0] % shards == 0 else None
    head, spread = head.split_rows(axes) if axes is not None else (head, None)
    return over_rows(partial(function, axes=axes), head, *arrays, spread=spread)
