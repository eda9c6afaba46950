"""What a run can learn, one objective in each file; `objective.py` has their types."""

from qlora_jax.errors import OptionError
from qlora_jax.finetune.objectives.dpo import DPO
from qlora_jax.finetune.objectives.objective import Batches, Objective, ObjectiveKind, Setting
from qlora_jax.finetune.objectives.seq2seq import SEQ2SEQ
from qlora_jax.finetune.objectives.sft import SFT
from qlora_jax.models import DecoderConfig, ModelConfig

# A new objective is one file of this package and one line here; the first one is the default.
OBJECTIVES: tuple[ObjectiveKind, ...] = (
    SFT,
    DPO,
    SEQ2SEQ,
)

__all__ = ["OBJECTIVES", "Batches", "Objective", "ObjectiveKind", "Setting", "objective_kind"]


def objective_kind(name: str, config: ModelConfig) -> ObjectiveKind:
    """Return the objective of that name for a model of this config.

    Raises:
        OptionError: there is none of that name for such a model.
    """
    encoder_decoder = not isinstance(config, DecoderConfig)
    kinds = {kind.name: kind for kind in OBJECTIVES if kind.encoder_decoder == encoder_decoder}
    if name not in kinds:
        model = "an encoder-decoder" if encoder_decoder else "a decoder-only model"
        raise OptionError(f"objective: expected {' or '.join(kinds)} with {model}, found {name}")
    return kinds[name]
