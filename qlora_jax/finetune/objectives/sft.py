"""Supervised fine-tuning of a decoder: the answers of conversations, or texts as a whole."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from qlora_jax.data import Batch, BatchIterator, Example, batches, bucket_length, checksum, encode_all
from qlora_jax.finetune.objectives.answers import greedy
from qlora_jax.finetune.objectives.corpus import Corpus, read_corpus
from qlora_jax.finetune.objectives.objective import Batches, Objective, ObjectiveKind, Setting
from qlora_jax.finetune.objectives.streaming import Stream, open_stream
from qlora_jax.models import DecoderConfig, ModelConfig
from qlora_jax.train import BatchArray, StepObjective, language_model_objective

if TYPE_CHECKING:
    from qlora_jax.finetune.options.options import Options


def sft_step(options: "Options") -> StepObjective:
    """Return the losses of supervised fine-tuning of a decoder."""
    return language_model_objective(
        packed=options.data.packs,
        neftune_alpha=options.optimizer.neftune_alpha,
        attention_groups=options.context.groups,
    )


def with_positions(step: StepObjective, config: ModelConfig) -> StepObjective:
    """Return the losses with the positions of the tokens where the rotations depend on the length of a text.

    They end where a text ends. Without them a row that is padded to the length of the longest one counts as one as long.
    """
    names = {array.name for array in step.arrays}
    if not isinstance(config, DecoderConfig) or not config.by_length or "positions" in names:
        return step
    return dataclasses.replace(step, arrays=(*step.arrays, BatchArray("positions")))


def read_sft_corpus(setting: Setting) -> tuple[Stream | None, Corpus[Example]]:
    """Return (the stream to train on, if there is one, the held-out examples and those to train on otherwise)."""
    options, data, tokenizer = setting.options, setting.options.data, setting.tokenizer
    encode = partial(
        encode_all,
        tokenizer=tokenizer,
        max_length=data.max_length,
        template=data.template,
        train_on_source=data.train_on_source,
        on_long=data.on_long,
        on_bad_row=data.on_bad_row,
        vocabulary=setting.config.vocab_size,
        source_max_length=data.source_max_length,
        target_max_length=data.target_max_length,
        progress=setting.progress,
    )
    if data.streaming:
        return open_stream(data, encode)
    shown, conversation = lambda example: (example,), lambda example: example.conversation
    return None, read_corpus(options, tokenizer, encode, shown, conversation)


def read_sft(setting: Setting) -> Objective:
    """Read the data and return the objective; see `ObjectiveKind.read`."""
    options, data = setting.options, setting.options.data
    stream, corpus = read_sft_corpus(setting)
    packed, pad_id = data.packs, cast(int, setting.tokenizer.pad_token_id)
    whole = packed or stream is not None
    length = data.max_length if whole else bucket_length([*corpus.training, *corpus.held_out], data.max_length)
    rows = partial(batches, length=length, pad_id=pad_id, packing=packed)

    def training(batch_size: int) -> Batches:
        if stream is not None:
            return stream.batches(options, rows=batch_size, pad_id=pad_id)
        return rows(corpus.training, batch_size=batch_size, seed=options.run.seed, group_by_length=data.group_by_length)

    def held_out(batch_size: int) -> BatchIterator:
        return rows(corpus.held_out, batch_size=batch_size, shuffle=False, epochs=1)

    return Objective(
        training=training,
        held_out=held_out if corpus.held_out else None,
        step=with_positions(sft_step(options), setting.config),
        count_tokens=_count_tokens,
        row=f"{'up to ' if data.group_by_length else ''}{length} tokens",
        length=length,
        template=corpus.template,
        prompts=_prompts(corpus.held_out[: options.run.samples]),
        answer=partial(greedy, eos_ids=setting.eos_ids),
        held_out_checksum=checksum(corpus.held_out),
    )


def _count_tokens(batch: Batch) -> int:
    return int((batch["segment_ids"] > 0).sum())


def _prompts(examples: Sequence[Example]) -> list[np.ndarray]:
    """What comes before the first learned token of each example that has a prompt."""
    starts = [int(np.flatnonzero(example.loss_mask)[0]) for example in examples]
    return [example.tokens[:start] for example, start in zip(examples, starts, strict=True) if start > 1]


SFT = ObjectiveKind(
    name="sft",
    summary="to answer as the data does",
    step=sft_step,
    read=read_sft,
    learning_rates=(1e-3, 2e-4, 1e-4),
    unused=("run.predict_with_generate",),
    packs=True,
    groups_attention=True,
)
