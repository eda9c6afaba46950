"""Direct preference optimisation: pairs of answers, of which the model is to prefer the chosen one."""

import itertools
from functools import partial
from typing import cast

import numpy as np

from qlora_jax.data import Batch, PreferenceBatches, bucket_length, encode_preferences, preference_batches
from qlora_jax.finetune.objectives.answers import greedy
from qlora_jax.finetune.objectives.corpus import read_corpus
from qlora_jax.finetune.objectives.objective import Objective, Setting, expect_defaults
from qlora_jax.finetune.options.options import Options
from qlora_jax.train import StepObjective, dpo_objective

# What has no meaning for pairs.
_UNUSED = (
    "data.train_on_source",
    "data.on_long",
    "data.source_max_length",
    "data.target_max_length",
    "data.group_by_length",
    "data.streaming",
    "optimizer.neftune_alpha",
    "run.predict_with_generate",
)


def dpo_step(options: Options) -> StepObjective:
    """Return the losses of direct preference optimisation."""
    chosen = options.objective
    given = {"beta": chosen.dpo_beta, "label_smoothing": chosen.label_smoothing}
    # The reference is the base itself if that is what training starts from.
    return dpo_objective(
        **{name: value for name, value in given.items() if value is not None}, reference=options.starts_from_adapter()
    )


def dpo(setting: Setting) -> Objective:
    """Reads the data; raises ValueError or OSError where they or options beside them cannot be used."""
    options, data, tokenizer = setting.options, setting.options.data, setting.tokenizer
    expect_defaults(options, _UNUSED, "with objective dpo")
    if data.packing:
        raise ValueError("packing: expected off with objective dpo, found on")
    if not data.sources:
        raise ValueError("data: expected preference pairs (chosen, rejected) with objective dpo, found none")
    encode = partial(encode_preferences, tokenizer=tokenizer, max_length=data.max_length, template=data.template)
    corpus = read_corpus(options, tokenizer, encode, lambda pair: (pair.chosen, pair.rejected), setting.say)
    both = itertools.chain.from_iterable((pair.chosen, pair.rejected) for pair in [*corpus.training, *corpus.held_out])
    length, pad_id = bucket_length(list(both), data.max_length), cast(int, tokenizer.pad_token_id)
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
    )
