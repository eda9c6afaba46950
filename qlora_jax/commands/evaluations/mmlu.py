"""Measure a model, with or without an adapter, on the questions of MMLU.

    python scripts/evaluate.py mmlu --mmlu cais/mmlu --model meta-llama/Llama-3.1-8B --adapter runs/mine/adapter
    python scripts/evaluate.py mmlu --mmlu five_shot_mmlu_val.json --limit 500
    python scripts/evaluate.py mmlu --mmlu questions.jsonl --shots 0

The accuracy of each subject and their mean are printed on stdout, the last line as JSON; everything else is printed on
stderr. With an adapter that train.py wrote, the base model has the storage that it had in training.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import jax
from flax import nnx

from qlora_jax import cli
from qlora_jax.adapters.pretrained import PretrainedOptions
from qlora_jax.data import check_ids
from qlora_jax.errors import OptionError
from qlora_jax.evaluate import Prompts, Scores, encode_questions, evaluate_mmlu, read_questions
from qlora_jax.models import CausalLM, causal_family_of, positions_left
from qlora_jax.nn import data_mesh


@dataclasses.dataclass(frozen=True)
class MMLUOptions:
    """Options of the questions."""

    mmlu: str | None = None
    """A file of MMLU questions, or cais/mmlu on the hub."""
    split: str | None = None
    """Split of a hub data set; validation if left out."""
    shots: int | None = None
    """Number of solved examples before each question; 5 if left out. Files with whole prompts (columns subject, input and
    output) contain their own."""
    examples: str | None = None
    """File or hub id of the solved examples; the split dev of a hub data set if left out."""
    limit: int | None = None
    """Number of questions, drawn at random; all of them if left out."""
    seed: int = 0
    """Seed of that random choice."""
    max_length: int = 2048
    """Maximum number of tokens of a prompt; solved examples are dropped from longer prompts."""
    batch_size: int = 8
    """Number of prompts in a batch."""

    def __post_init__(self) -> None:
        low = [name for name in ("max_length", "batch_size") if getattr(self, name) < 1]
        if low:
            raise OptionError("; ".join(f"{name}: expected at least 1, found {getattr(self, name)}" for name in low))


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    mmlu: MMLUOptions = dataclasses.field(default_factory=MMLUOptions)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(evaluate, Options, __doc__, arguments, program=program)


def evaluate(options: Options) -> Scores:
    """Ask the model all questions, print the accuracies and return them."""
    asked = options.mmlu
    if asked.mmlu is None:
        raise OptionError("--mmlu: expected a file of questions or cais/mmlu, found none")
    mesh = data_mesh()
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        model, prompts, description = load(options)
        print(description, file=sys.stderr)
        graphdef, state = nnx.split(model)
        scores = evaluate_mmlu(graphdef, state, prompts, batch_size=asked.batch_size, progress=sys.stderr.isatty())
    for subject, accuracy in sorted(scores.by_subject.items()):
        print(f"{subject:<40} {accuracy:.3f} of {scores.counts[subject]:,}")
    print(
        json.dumps({"accuracy": scores.accuracy, "questions": sum(scores.counts.values()), "subjects": len(scores.counts)})
    )
    return scores


def load(options: Options) -> tuple[CausalLM, Prompts, str]:
    """Return the model with its adapter, the prompts and a description of them.

    All small files are read before the weights, so that their errors are found early.
    """
    asked, pretrained = options.mmlu, options.model.open()
    causal_family_of(pretrained.checkpoint.config)  # raises for an encoder-decoder
    questions = read_questions(
        str(asked.mmlu),
        split=asked.split,
        shots=asked.shots,
        examples=asked.examples,
        limit=asked.limit,
        seed=asked.seed,
    )
    room = positions_left(pretrained.checkpoint.model_config, pretrained.method)
    longest = asked.max_length if room is None else min(asked.max_length, room)
    prompts = encode_questions(questions.questions, pretrained.tokenizer, longest)
    vocabulary = pretrained.checkpoint.model_config.vocab_size
    for number, tokens in enumerate(prompts.tokens):
        check_ids(tokens, pretrained.tokenizer, vocabulary, f"MMLU, prompt {number}: ")
    model = pretrained.load(mesh=data_mesh(), progress=sys.stderr.isatty())
    assert isinstance(model, CausalLM)  # `causal_family_of` raises an error for other models
    return model, prompts, f"{questions}; {prompts}"
