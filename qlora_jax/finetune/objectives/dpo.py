"""Direct preference optimisation: pairs of answers, of which the model is to prefer the chosen one."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from qlora_jax.data import (
    Batch,
    Example,
    PreferenceBatches,
    PreferenceExample,
    bucket_length,
    checksum,
    encode_preferences,
    preference_batches,
)
from qlora_jax.errors import OptionError
from qlora_jax.finetune.objectives.answers import greedy
from qlora_jax.finetune.objectives.corpus import read_corpus
from qlora_jax.finetune.objectives.objective import Objective, ObjectiveKind, Setting
from qlora_jax.peft import Option
from qlora_jax.train import StepObjective, dpo_objective

if TYPE_CHECKING:
    from qlora_jax.finetune.options.options import Options


def dpo_step(options: "Options") -> StepObjective:
    """Return the losses of direct preference optimisation."""
    given = {name.removeprefix("dpo_"): value for name, value in options.objective.given().items()}
    # The reference is the base itself if that is what training starts from.
    return dpo_objective(**given, reference=options.starts_from_adapter())


def read_dpo(setting: Setting) -> Objective:
    """Read the data and return the objective; see `ObjectiveKind.read`."""
    options, data, tokenizer = setting.options, setting.options.data, setting.tokenizer
    if not data.sources:
        raise OptionError("data: expected preference pairs (chosen, rejected) with objective dpo, found none")
    encode = partial(
        encode_preferences,
        tokenizer=tokenizer,
        max_length=data.max_length,
        template=data.template,
        on_bad_row=data.on_bad_row,
        vocabulary=setting.config.vocab_size,
    )
    corpus = read_corpus(options, tokenizer, encode, lambda pair: (pair.chosen, pair.rejected))
    length, pad_id = (
        bucket_length(_sequences([*corpus.training, *corpus.held_out]), data.max_length),
        cast(int, tokenizer.pad_token_id),
    )
    rows = partial(preference_batches, length=length, pad_id=pad_id)

    def training(batch_size: int) -> PreferenceBatches:
        return rows(corpus.training, batch_size=batch_size, seed=options.run.seed)

    def held_out(batch_size: int) -> PreferenceBatches:
        return rows(corpus.held_out, batch_size=batch_size, shuffle=False, epochs=1)

    def count_tokens(batch: Batch) -> int:
        return sum(int(np.count_nonzero(batch[f"{side}_inputs"] != pad_id)) for side in ("chosen", "rejected"))

    prompts = [pair.prompt for pair in corpus.held_out[: options.run.samples] if len(pair.prompt)]
    return Objective(
        training=training,
        held_out=held_out if corpus.held_out else None,
        step=dpo_step(options),
        count_tokens=count_tokens,
        row=f"2 × {length} tokens",
        length=length,
        template=corpus.template,
        prompts=prompts,
        answer=partial(greedy, eos_ids=setting.eos_ids),
        held_out_checksum=checksum(_sequences(corpus.held_out)),
    )


def _sequences(pairs: Sequence[PreferenceExample]) -> list[Example]:
    return [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]


DPO = ObjectiveKind(
    name="dpo",
    summary="to prefer chosen answers to rejected ones",
    step=dpo_step,
    read=read_dpo,
    learning_rates=(5e-5, 5e-6, 5e-6),
    method_rate_divisor=20,
    options=(
        Option(
            "dpo_beta",
            float | None,
            None,
            "How closely DPO stays to the reference; 0.1 if left out.",
            lambda beta: 0 < beta < math.inf,
            "a number above 0",
        ),
        Option(
            "label_smoothing",
            float | None,
            None,
            "Share of the pairs that DPO assumes to be labelled the wrong way round; 0 if left out.",
            lambda share: 0 <= share < 0.5,
            "0 to below 0.5",
        ),
    ),
    unused=(
        "data.train_on_source",
        "data.on_long",
        "data.source_max_length",
        "data.target_max_length",
        "data.group_by_length",
        "data.streaming",
        "optimizer.neftune_alpha",
        "run.predict_with_generate",
    ),
)
