"""The objectives of this package, each as the one value that training, precompilation and the planner read.

language_model_objective    the next token, over the learned tokens of conversations or texts
seq2seq_objective           the targets of an encoder-decoder, word by word
dpo_objective               which of two answers is preferred
"""

from functools import partial

from qlora_jax.errors import OptionError
from qlora_jax.train.dpo import PAIRS, dpo_loss, with_reference
from qlora_jax.train.loss import language_model_loss, language_model_metrics, seq2seq_loss, seq2seq_metrics
from qlora_jax.train.spec import BatchArray, StepObjective, unchanged
from qlora_jax.train.step import TOKENS

_LEARNED = (BatchArray("inputs"), BatchArray("targets"), BatchArray("loss_mask", "float32"))


def language_model_objective(*, packed: bool = True, neftune_alpha: float = 0.0, attention_groups: int = 1) -> StepObjective:
    """Return supervised fine-tuning of a decoder.

    Args:
        packed: whether a row can hold several documents. A row of one document needs no mask but the causal one, since its
            padding is on the right, and kernels are faster without.
        neftune_alpha: the noise on the embeddings in training; 0 for none.
        attention_groups: the groups of LongLoRA's attention in training; 1 for dense attention.

    Raises:
        OptionError: less than one group.
    """
    if attention_groups < 1:
        raise OptionError(f"attention_groups: expected at least 1, found {attention_groups}")
    return StepObjective(
        name="sft",
        loss=partial(language_model_loss, neftune_alpha=neftune_alpha, attention_groups=attention_groups),
        held_out_loss=language_model_metrics,
        unit=TOKENS,
        arrays=(*_LEARNED, *((BatchArray("segment_ids"), BatchArray("positions")) if packed else ())),
        attention_groups=attention_groups,
        neftune_alpha=neftune_alpha,
    )


def seq2seq_objective() -> StepObjective:
    """Return supervised fine-tuning of an encoder-decoder."""
    sources = (BatchArray("sources", of_source=True), BatchArray("source_mask", "bool", of_source=True))
    return StepObjective(
        name="sft", loss=seq2seq_loss, held_out_loss=seq2seq_metrics, unit=TOKENS, arrays=(*_LEARNED, *sources)
    )


def dpo_objective(*, beta: float = 0.1, label_smoothing: float = 0.0, reference: bool = False) -> StepObjective:
    """Return direct preference optimisation of a decoder.

    Args:
        beta, label_smoothing: as `dpo_loss` takes them.
        reference: whether the reference is a copy of the adapter from which training starts; else it is the base.
    """
    loss = partial(dpo_loss, beta=beta, label_smoothing=label_smoothing)
    return StepObjective(
        name="dpo",
        loss=loss,
        held_out_loss=loss,
        unit=PAIRS,
        arrays=tuple(
            BatchArray(f"{side}_{array.name}", array.dtype) for side in ("chosen", "rejected") for array in _LEARNED
        ),
        sequences=2,
        prepare=with_reference if reference else unchanged,
    )
