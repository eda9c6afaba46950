"""Fine-tuning of an encoder-decoder: targets, word by word, from sources."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx
from tqdm import tqdm

from qlora_jax.data import Batch, Example, Seq2SeqBatches, Seq2SeqExample, checksum, encode_all_seq2seq, seq2seq_batches
from qlora_jax.evaluate import rouge_l
from qlora_jax.finetune.objectives.answers import LONGEST_ANSWER
from qlora_jax.finetune.objectives.corpus import read_corpus
from qlora_jax.finetune.objectives.objective import Objective, ObjectiveKind, Setting
from qlora_jax.models import Model, T5Config
from qlora_jax.serve import generate_seq2seq
from qlora_jax.train import StepObjective, seq2seq_objective

if TYPE_CHECKING:
    from qlora_jax.finetune.options.options import Options


def seq2seq_step(options: "Options") -> StepObjective:
    """Return the losses of an encoder-decoder."""
    return seq2seq_objective()


def read_seq2seq(setting: Setting) -> Objective:
    """Read the data and return the objective; see `ObjectiveKind.read`."""
    options, data, tokenizer, config = setting.options, setting.options.data, setting.tokenizer, setting.config
    assert isinstance(config, T5Config)
    encode = partial(
        encode_all_seq2seq,
        tokenizer=tokenizer,
        max_source_length=data.source_max_length or data.max_length,
        max_target_length=data.target_max_length or data.max_length,
        template=data.template,
        on_long=data.on_long,
        on_bad_row=data.on_bad_row,
        vocabulary=setting.config.vocab_size,
    )
    corpus = read_corpus(options, tokenizer, encode, lambda pair: (_joined(pair),))
    pairs = [*corpus.training, *corpus.held_out]
    source_length = _bucket(max(len(pair.source) for pair in pairs))
    target_length = _bucket(max(len(pair.target) for pair in pairs))
    start = config.decoder_start_token_id
    rows = partial(
        seq2seq_batches,
        source_length=source_length,
        target_length=target_length,
        pad_id=cast(int, tokenizer.pad_token_id),
        decoder_start_id=start,
    )

    def training(batch_size: int) -> Seq2SeqBatches:
        return rows(corpus.training, batch_size=batch_size, seed=options.run.seed)

    def held_out(batch_size: int) -> Seq2SeqBatches:
        return rows(corpus.held_out, batch_size=batch_size, shuffle=False, epochs=1)

    def answer(model: Model, sources: Sequence[np.ndarray], max_new_tokens: int = LONGEST_ANSWER) -> list[list[int]]:
        graphdef, state = nnx.split(model)
        return generate_seq2seq(
            graphdef,
            state,
            [source.tolist() for source in sources],
            max_new_tokens=max_new_tokens,
            eos_ids=setting.eos_ids,
            decoder_start_id=start,
        )

    def score(model: Model) -> dict[str, float]:
        """RougeL of greedy answers to all held-out sources; what is compared is the text of tokens."""
        size, found = options.run.batch_size, []
        for first in tqdm(range(0, len(corpus.held_out), size), desc="answering", leave=False, disable=not setting.progress):
            sources = [pair.source for pair in corpus.held_out[first : first + size]]
            filled = sources + sources[-1:] * (size - len(sources))  # the last batch too: another size compiles anew
            found += answer(model, filled, target_length)[: len(sources)]
        references = [pair.target.tolist() for pair in corpus.held_out]
        return {"rougeL": rouge_l(_texts(tokenizer, found), _texts(tokenizer, references))}

    return Objective(
        training=training,
        held_out=held_out if corpus.held_out else None,
        step=seq2seq_step(options),
        count_tokens=_count_tokens,
        row=f"{source_length} source and {target_length} target tokens",
        length=target_length,
        source_length=source_length,
        template=corpus.template,
        prompts=[pair.source for pair in corpus.held_out[: options.run.samples]],
        answer=answer,
        held_out_checksum=checksum(map(_joined, corpus.held_out)),
        score=score if corpus.held_out else None,
    )


def _count_tokens(batch: Batch) -> int:
    return int(batch["source_mask"].sum() + batch["loss_mask"].sum())


def _joined(pair: Seq2SeqExample) -> Example:
    """A pair as one sequence whose target is learned."""
    tokens = np.concatenate([pair.source, pair.target])
    return Example(tokens, np.arange(len(tokens)) >= len(pair.source))


def _bucket(longest: int, multiple: int = 64) -> int:
    return -(-longest // multiple) * multiple


def _texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


SEQ2SEQ = ObjectiveKind(
    name="sft",
    summary="or, with an encoder-decoder, to make targets from sources",
    step=seq2seq_step,
    read=read_seq2seq,
    learning_rates=(1e-3, 2e-4, 1e-4),
    unused=("data.train_on_source", "data.group_by_length", "data.streaming", "optimizer.neftune_alpha"),
    encoder_decoder=True,
)
