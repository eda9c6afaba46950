"""The options of training on sequences that are longer than the model's context, or too long for full attention.

--longlora trains as LongLoRA does (Chen et al. 2023): attention in four groups of a row, with half of the heads shifted by
half a group; the token embedding and all norms train too; positions are divided by length / context, rounded up.
"""

import dataclasses
import logging

from qlora_jax.errors import OptionError
from qlora_jax.finetune.objectives import OBJECTIVES
from qlora_jax.models import DecoderConfig, ModelConfig, RopeKind, RopeScaling, factor_for, unscaled_context
from qlora_jax.peft import Method

LONGLORA_GROUPS = 4
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ContextOptions:
    """Sequences beyond the model's context."""

    longlora: bool = False
    """Train as LongLoRA does: 4 attention groups, the token embedding and all norms train too, and linear rope-scaling if
    max-length is beyond the context."""
    attention_groups: int | None = None
    """Train with shifted sparse attention in so many groups of a row, which divides the cost of attention by this number; 1
    (full attention) if left out, 4 with longlora. Evaluation and inference use full attention."""
    rope_scaling: RopeKind | None = None
    """Scale rotary positions: linear, dynamic (NTK) or yarn. The scaling is recorded beside the adapter, so that generation,
    evaluation and merging use it too. If left out, the scaling of the model, or of the adapter to continue from."""
    rope_factor: float | None = None
    """Factor of the scaling; max-length / context, rounded up, if left out."""

    def __post_init__(self) -> None:
        if self.attention_groups is not None and self.attention_groups < 1:
            raise OptionError(f"attention_groups: expected at least 1, found {self.attention_groups}")
        if self.rope_factor is not None and self._kind is None:
            raise OptionError(f"rope_factor: expected rope_scaling beside it, found {self.rope_factor:g} alone")
        if self._kind is not None:
            RopeScaling(self._kind, 2.0 if self.rope_factor is None else self.rope_factor)

    @property
    def _kind(self) -> RopeKind | None:
        return self.rope_scaling or ("linear" if self.longlora else None)

    @property
    def groups(self) -> int:
        """The number of attention groups of a row."""
        return self.attention_groups or (LONGLORA_GROUPS if self.longlora else 1)

    def scaling(self, config: ModelConfig, length: int) -> RopeScaling | None:
        """Return the scaling of positions for rows of at most so many tokens; None: the model's own.

        Raises:
            OptionError: the model cannot be scaled, or rows are within its context and no factor is given.
        """
        if self._kind is None:
            return None
        if self.longlora and self.rope_scaling is None and self.rope_factor is None and not _is_beyond(config, length):
            return None
        context = unscaled_context(config)
        if self.rope_factor is None and length <= context:
            raise OptionError(
                f"rope_scaling: expected rope_factor, or max_length beyond the model's context of {context}, found {length}"
            )
        return RopeScaling(self._kind, self.rope_factor or factor_for(length, context))

    def with_trained_modules(self, method: Method, config: ModelConfig) -> Method:
        """Return the method with the modules that LongLoRA trains in full as well: those named after embed or norm."""
        if not self.longlora:
            return method
        mappings = (mapping for mapping in config.parameter_mappings if not mapping.linear)
        names = (name.rsplit(".", 1)[-1] for mapping in mappings for name in mapping.modules())
        more = (name for name in names if "embed" in name or "norm" in name)
        return dataclasses.replace(method, modules_to_save=tuple(dict.fromkeys([*method.modules_to_save, *more])))

    def check(self, config: ModelConfig, objective: str) -> None:
        """Raise OptionError where the model or the objective does not support grouped attention."""
        if self.groups == 1:
            return
        names = [kind.name for kind in OBJECTIVES if kind.groups_attention]
        if not isinstance(config, DecoderConfig) or objective not in names:
            found = objective if isinstance(config, DecoderConfig) else "an encoder-decoder"
            expected = " or ".join(names)
            raise OptionError(f"attention_groups: expected a decoder-only model and objective {expected}, found {found}")
        if config.num_attention_heads < 2:
            raise OptionError("attention_groups: expected at least 2 attention heads, found 1")


def warn_beyond(config: ModelConfig, length: int) -> None:
    """Log a message where rows have positions that the model has never seen, and its positions are not scaled for them."""
    if _is_beyond(config, length):
        assert isinstance(config, DecoderConfig)
        _logger.info(
            "Rows of %d tokens are beyond the model's context of %d: it has never seen such positions. "
            "--rope-scaling linear (or dynamic, yarn) stretches those that it knows.",
            length,
            config.max_position_embeddings,
        )


def _is_beyond(config: ModelConfig, length: int) -> bool:
    return isinstance(config, DecoderConfig) and not config.endless and length > config.max_position_embeddings
