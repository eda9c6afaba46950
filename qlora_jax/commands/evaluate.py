"""Measure models: each kind of measurement is a sub-command, a module of `evaluations`.

    python scripts/evaluate.py                                     list the sub-commands
    python scripts/evaluate.py score --help                        the options of one of them
    python scripts/evaluate.py mmlu --mmlu cais/mmlu --model …     run it

A command line that starts with an option is that of `mmlu`.
"""

import sys
from collections.abc import Sequence

from qlora_jax.commands import choose

__all__ = ["EVALUATIONS", "main"]

EVALUATIONS = {
    "mmlu": "accuracy of a model on the questions of MMLU; the default if an option comes first",
    "perplexity": "perplexity of a model on texts, over a sliding window",
    "generate": "answers of a model to the questions of a file, for a judge",
    "compare": "a base, its quantised form, adapters and merged models, by the same data",
    "task": "tasks of EleutherAI's lm-evaluation-harness (the extra `eval`)",
    "judge": "judgements of pairs of answers, by a model at an endpoint or one that is loaded here",
    "score": "scores of a judge, relative to a reference model",
    "elo": "Elo and Bradley-Terry ratings from the verdicts of a judge",
    "agreement": "agreement of judges with each other, and of a judge with itself in the other order",
    "report": "one HTML page of judgements, answers and the results of the other sub-commands",
}


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the sub-command that the first argument names, or `mmlu`, and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help"):
        given = ["mmlu", *given]
    return choose(EVALUATIONS, given, program=program or "evaluate.py", package="qlora_jax.commands.evaluations")
