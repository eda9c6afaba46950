"""Ask a model, with or without an adapter, the questions of MMLU.

    python scripts/evaluate.py --mmlu cais/mmlu --model meta-llama/Llama-3.1-8B --adapter runs/mine/adapter
    python scripts/evaluate.py --mmlu five_shot_mmlu_val.json --limit 500
    python scripts/evaluate.py --mmlu questions.jsonl --shots 0

The accuracy of each subject and their mean go to stdout, the last line as JSON; everything else to stderr. An adapter that
train.py made is asked on the base in the storage that it was trained on.
"""

import dataclasses
import json
import sys
from contextlib import nullcontext

import jax
from flax import nnx

from qlora_jax.adapters.pretrained import PretrainedOptions
from qlora_jax.cli import run
from qlora_jax.evaluate import Prompts, Scores, encode_questions, evaluate_mmlu, read_questions
from qlora_jax.models import CausalLM, causal_family_of, positions_left
from qlora_jax.nn import data_mesh


@dataclasses.dataclass(frozen=True)
class MMLUOptions:
    """Which questions."""

    mmlu: str | None = None
    """A file of MMLU questions, or cais/mmlu on the hub."""
    split: str | None = None
    """Split of a hub data set; validation if left out."""
    shots: int | None = None
    """Solved examples before each question; 5 if left out. Whole prompts (columns subject, input, output) have theirs."""
    examples: str | None = None
    """File or hub id of the examples; the split dev of a hub data set if left out."""
    limit: int | None = None
    """Ask a random sample of so many questions; all if left out."""
    seed: int = 0
    """Of that sample."""
    max_length: int = 2048
    """The most tokens of a prompt; longer ones lose examples."""
    batch_size: int = 8
    """Prompts at a time."""

    def __post_init__(self) -> None:
        low = [name for name in ("max_length", "batch_size") if getattr(self, name) < 1]
        if low:
            raise ValueError("; ".join(f"{name}: expected at least 1, found {getattr(self, name)}" for name in low))


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    mmlu: MMLUOptions = dataclasses.field(default_factory=MMLUOptions)


def evaluate(options: Options) -> Scores:
    """Asks and prints."""
    asked = options.mmlu
    if asked.mmlu is None:
        raise ValueError("--mmlu: expected a file of questions or cais/mmlu, found none")
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
    """(the model with its adapter, the prompts, what they are in words); all small files are read before the weights."""
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
    model = pretrained.load(mesh=data_mesh(), progress=sys.stderr.isatty())
    assert isinstance(model, CausalLM)  # as `causal_family_of` has made sure
    return model, prompts, f"{questions}; {prompts}"


if __name__ == "__main__":
    run(evaluate, Options, __doc__)
