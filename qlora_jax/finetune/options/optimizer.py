"""The options of the optimizer."""

import dataclasses
import math

from qlora_jax.errors import OptionError
from qlora_jax.finetune.objectives.objective import ObjectiveKind
from qlora_jax.peft import Method
from qlora_jax.train import OPTIMIZERS, OptimizerName, Schedule


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rate."""

    optimizer: OptimizerName = "adamw"
    """Update rule. Bytes of its state for each parameter: adamw 8, adamw8bit 2, lion 4, adafactor almost none."""
    learning_rate: float | None = None
    """The highest learning rate. If left out, it follows from the size of the model: 1e-3 below 1 billion parameters, 2e-4
    below 20 billion, otherwise 1e-4 (the last two are QLoRA's); for DPO 5e-5, 5e-6 and 5e-6; a tenth of that for lion and
    for full fine-tuning. For models of any size: ia3 3e-3, prompt-tuning 3e-2, prefix-tuning 1e-2, p-tuning and
    prefix-projection 1e-3; a twentieth of that for DPO."""
    schedule: Schedule = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises, unless warmup-steps is given."""
    warmup_steps: int | None = None
    """Number of steps in which the learning rate rises, instead of a share of them."""
    beta1: float | None = None
    """Decay of the first moment; 0.9 if left out."""
    beta2: float | None = None
    """Decay of the second moment; 0.999 if left out, 0.99 for lion."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step takes off learning rate x decay of everything that trains. That pulls towards the
    base model as it is, also with method full and for modules-to-save, whose changes decay and not their weights; with pissa
    and loftq towards the base without what they took out of it; with virtual tokens towards zero vectors."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: factor on the learning rate of LoRA's B, of norms and of DoRA's magnitudes; no factor if left out."""
    max_grad_norm: float = 0.3
    """Global norm to which gradients are clipped; 0 for no clipping."""
    host_offload: bool = False
    """Keep the optimizer's state in host memory (what paged optimizers are for)."""
    host_adapter: bool = False
    """Keep the adapter and its gradient in host memory as well; the device then holds one layer of them at a time."""
    neftune_alpha: float = 0.0
    """Strength of the noise on the embeddings while training (NEFTune; 5 is usual); 0 for none."""

    def __post_init__(self) -> None:
        problems = []
        if self.optimizer not in OPTIMIZERS:
            problems.append(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {self.optimizer!r}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate: expected a number above 0, found {self.learning_rate}")
        if self.loraplus_lr_ratio is not None and not 0 < self.loraplus_lr_ratio < math.inf:
            problems.append(f"loraplus_lr_ratio: expected a number above 0, found {self.loraplus_lr_ratio}")
        if not 0 <= self.warmup_ratio <= 1:
            problems.append(f"warmup_ratio: expected 0 to 1, found {self.warmup_ratio}")
        if self.warmup_steps is not None:
            if self.warmup_steps < 0:
                problems.append(f"warmup_steps: expected at least 0, found {self.warmup_steps}")
            if self.warmup_ratio != OptimizerOptions.warmup_ratio:
                problems.append(f"warmup_ratio: expected none beside warmup_steps, found {self.warmup_ratio}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta is not None and self.optimizer == "adafactor":
                problems.append(f"{name}: expected none with the optimizer adafactor, found {beta}")
            elif beta is not None and not 0 <= beta < 1:
                problems.append(f"{name}: expected 0 to below 1, found {beta}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.max_grad_norm < math.inf):
            found = f"{self.weight_decay}, {self.max_grad_norm}"
            problems.append(f"weight_decay, max_grad_norm: expected numbers of at least 0, found {found}")
        if not 0 <= self.neftune_alpha < math.inf:
            problems.append(f"neftune_alpha: expected a number of at least 0, found {self.neftune_alpha}")
        if problems:
            raise OptionError("; ".join(problems))

    def warmup(self, steps: int) -> int:
        """Return the number of steps in which the learning rate rises, in a run of so many steps."""
        return round(steps * self.warmup_ratio) if self.warmup_steps is None else self.warmup_steps

    def peak_learning_rate(self, parameters: int, objective: ObjectiveKind, method: Method) -> float:
        """Return the highest learning rate of a run on a base model of so many parameters."""
        if self.learning_rate is not None:
            return self.learning_rate
        small, middle, large = objective.learning_rates
        if method.default_learning_rate is not None:
            rate = method.default_learning_rate / objective.method_rate_divisor
        else:
            rate = small if parameters < 1e9 else middle if parameters < 20e9 else large
            rate *= method.learning_rate_factor
        return rate / 10 if self.optimizer == "lion" else rate  # Lion's updates are ±1 each, ten times Adam's norm
