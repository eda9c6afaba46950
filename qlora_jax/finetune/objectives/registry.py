"""The objectives of the job, with one line each.

The job, the programs that it compiles in advance and the plan of a job all find an objective here. A new one is a file
beside this one with a step and a reader of its data, a line here, and its name among the values of the option `objective`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_jax.finetune.objectives.dpo import dpo, dpo_step
from qlora_jax.finetune.objectives.objective import Objective, Setting
from qlora_jax.finetune.objectives.seq2seq import seq2seq, seq2seq_step
from qlora_jax.finetune.objectives.sft import sft, sft_step
from qlora_jax.finetune.options.options import Options
from qlora_jax.models import DecoderConfig, ModelConfig
from qlora_jax.train import StepObjective


@dataclass(frozen=True)
class ObjectiveKind:
    """One kind of objective.

    Attributes:
        step: returns its losses and batch arrays for the options of a run; it reads no data.
        read: reads the data of a run and returns the objective with its batches.
    """

    step: Callable[[Options], StepObjective]
    read: Callable[[Setting], Objective]


DECODER_OBJECTIVES: dict[str, ObjectiveKind] = {  # by the option `objective`
    "sft": ObjectiveKind(sft_step, sft),
    "dpo": ObjectiveKind(dpo_step, dpo),
}
SEQ2SEQ = ObjectiveKind(seq2seq_step, seq2seq)  # of encoder-decoders


def objective_for(options: Options, config: ModelConfig) -> ObjectiveKind:
    """Return the objective of the options for a model of this config."""
    return DECODER_OBJECTIVES[options.objective.objective] if isinstance(config, DecoderConfig) else SEQ2SEQ
