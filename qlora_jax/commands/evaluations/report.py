"""Put evaluations on one page: an HTML file that opens without a network.

    python scripts/evaluate.py report verdicts.jsonl scores.jsonl base.jsonl adapter.jsonl mmlu.json --output report.html

The files may be judgements, answers, and the output of any other sub-command (its last line is JSON), in any mixture. The
page has tables, ratings with their intervals, who won against whom, what the position of an answer did, the agreement of
judges, and answers side by side. The last line is JSON.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import tyro

from qlora_jax import cli
from qlora_jax.commands.evaluations.output import check_least, print_json
from qlora_jax.errors import OptionError
from qlora_jax.evaluate.report import page, read_sources, sections_of


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of judgements, of answers, or with the output of other sub-commands."""
    output: Path = Path("report.html")
    """The page to write."""
    title: str = "Evaluation"
    """Title of the page."""
    samples: int = 5
    """Number of questions whose answers are shown side by side."""
    answer_length: int = 1_500
    """Number of characters of an answer that are shown."""
    orders: int = 2_000
    """Number of random orders of the Elo ratings."""
    seed: int = 0
    """Seed of the orders and of the resamples."""

    def __post_init__(self) -> None:
        check_least(self, samples=0, answer_length=1, orders=1, seed=0)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(report, Options, __doc__, arguments, program=program)


def report(options: Options) -> None:
    """Write the page."""
    if not options.files:
        raise OptionError("report: expected files of judgements, answers or results, found none")
    if options.output.is_dir():
        raise OptionError(f"output: expected a file, found the folder {options.output}")
    if options.output.resolve() in [path.resolve() for path in options.files]:
        raise OptionError(f"output: expected another file than those that are read, found {options.output}")
    sections = sections_of(
        read_sources(options.files),
        orders=options.orders,
        samples=options.samples,
        longest=options.answer_length,
        seed=options.seed,
    )
    data = page(options.title, f"From {', '.join(path.name for path in options.files)}.", sections)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    beside = options.output.with_name(f".{options.output.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, options.output)
    finally:
        beside.unlink(missing_ok=True)
    print_json({"report": str(options.output), "bytes": len(data), "sections": [title for title, _ in sections]})
