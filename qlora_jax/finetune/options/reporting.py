"""The options of what is measured during a run and where its results go."""

import dataclasses
from typing import Literal

from qlora_jax.errors import OptionError

TrackerName = Literal["tensorboard", "wandb"]


@dataclasses.dataclass(frozen=True)
class WatchOptions:
    """What is measured during the run, and where its results go."""

    mmlu: str | None = None
    """Questions to ask before, during and after: a file of MMLU questions, or cais/mmlu on the hub; none if left out."""
    mmlu_every: int = 0
    """Steps between two measurements of MMLU; 0: only before and after training."""
    mmlu_split: str | None = None
    """Split of a hub data set; validation if left out."""
    mmlu_shots: int | None = None
    """Number of solved examples before each question; 5 if left out. Whole prompts (columns subject, input, output) have
    their own."""
    mmlu_examples: str | None = None
    """File or hub id of the examples; the split dev of a hub data set if left out."""
    mmlu_limit: int | None = None
    """Ask a random sample of so many questions, drawn by the seed of the run; all if left out."""
    mmlu_max_length: int = 2048
    """The most tokens of a prompt; examples are removed from longer prompts."""
    mmlu_batch_size: int = 8
    """Number of prompts in a batch."""
    sample_every: int = 0
    """Steps between two answers to held-out prompts (as many as `samples`), written to samples.jsonl; 0: none."""
    report_to: tuple[TrackerName, ...] = ()
    """Experiment trackers that get the metrics of each step."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, USER/NAME, to upload the adapter to; it is made if it does not exist."""
    hub_private: bool = False
    """Make that repository a private one."""

    def __post_init__(self) -> None:
        least = {"mmlu_every": 0, "mmlu_max_length": 1, "mmlu_batch_size": 1, "sample_every": 0}
        least |= {
            name: bound for name, bound in {"mmlu_shots": 0, "mmlu_limit": 1}.items() if getattr(self, name) is not None
        }
        problems = [
            f"{name}: expected at least {bound}, found {getattr(self, name)}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if self.mmlu is None:
            for field in dataclasses.fields(self):
                if field.name.startswith("mmlu_") and (found := getattr(self, field.name)) != field.default:
                    problems.append(f"{field.name}: expected mmlu beside it, found {found!r} alone")
        if len(set(self.report_to)) < len(self.report_to):
            problems.append(f"report_to: expected each tracker once, found {', '.join(self.report_to)}")
        if self.hub_private and self.push_to_hub is None:
            problems.append("hub_private: expected push_to_hub beside it, found none")
        if problems:
            raise OptionError("; ".join(problems))
