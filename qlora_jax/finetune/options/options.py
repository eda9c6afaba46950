"""The options of a run, in groups (one file each), and the checks of options of several groups against each other.

The groups are the one place of all defaults. The docstrings of their fields are the help of the command line.
"""

import dataclasses

from qlora_jax.cluster import HostOptions
from qlora_jax.errors import OptionError
from qlora_jax.finetune.options.context import ContextOptions
from qlora_jax.finetune.options.data import DataOptions
from qlora_jax.finetune.options.health import HealthOptions
from qlora_jax.finetune.options.lora import LoRAOptions
from qlora_jax.finetune.options.model import ModelOptions
from qlora_jax.finetune.options.objective import ObjectiveOptions
from qlora_jax.finetune.options.optimizer import OptimizerOptions
from qlora_jax.finetune.options.reporting import WatchOptions
from qlora_jax.finetune.options.run import RunOptions
from qlora_jax.finetune.options.tuning import TuningOptions
from qlora_jax.peft import METHODS, LoRA, Method, reads_weights


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a language model with QLoRA."""

    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    lora: LoRAOptions = dataclasses.field(default_factory=LoRAOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    objective: ObjectiveOptions = dataclasses.field(default_factory=ObjectiveOptions)
    watch: WatchOptions = dataclasses.field(default_factory=WatchOptions)
    health: HealthOptions = dataclasses.field(default_factory=HealthOptions)
    tuning: TuningOptions = dataclasses.field(default_factory=TuningOptions)
    context: ContextOptions = dataclasses.field(default_factory=ContextOptions)
    hosts: HostOptions = dataclasses.field(default_factory=HostOptions)

    def method(self) -> Method:
        """Return the method of fine-tuning that the options describe.

        Raises:
            OptionError: options that contradict each other.
        """
        return self.tuning.build(self.lora.values())

    def starts_from_adapter(self) -> bool:
        """Return whether training starts from another function than that of the base alone."""
        return self.model.adapter is not None or reads_weights(self.lora.init_lora_weights or True)

    def check(self) -> None:
        """Raise OptionError where options of several groups contradict each other."""
        self._check_method()
        if self.model.adapter is not None:
            fresh = dataclasses.asdict(LoRAOptions(dropout=self.lora.dropout))
            given = [name for name, value in dataclasses.asdict(self.lora).items() if value != fresh[name]]
            if given:
                raise OptionError(f"adapter: has its own shape: expected no {', '.join(given)} beside it, found some")
            if self.tuning != TuningOptions():
                raise OptionError(f"adapter: is of its own method: expected no method beside it, found {self.tuning.method}")
        share = "held_out_rows" if self.data.streaming else "held_out"
        none_held_out = self.data.eval_data is None and getattr(self.data, share) == 0
        if self.run.early_stopping_patience and none_held_out:
            raise OptionError(f"early_stopping_patience: expected held-out data, found {share} 0 and no eval_data")
        if self.watch.sample_every and (self.run.samples == 0 or none_held_out):
            raise OptionError("sample_every: expected held-out data and samples of at least 1, found none")
        if self.run.predict_with_generate and none_held_out:
            raise OptionError(f"predict_with_generate: expected held-out data, found {share} 0 and no eval_data")
        found = getattr(self.data, share)
        if self.data.eval_data is not None and found not in (0, getattr(DataOptions, share)):
            raise OptionError(f"{share}: expected none beside eval_data, found {found:g}")
        if self.data.streaming and self.run.max_steps is None:
            raise OptionError("streaming: expected max_steps beside it (the length of a stream is unknown), found none")
        if self.data.streaming and self.run.epochs != RunOptions.epochs:
            raise OptionError(f"epochs: expected max_steps alone with streaming, found {self.run.epochs}")

    def check_several_processes(self) -> None:
        """Raise OptionError where an option needs a model that generates, which takes one process."""
        asked = {
            "predict_with_generate": self.run.predict_with_generate,
            "sample_every": self.watch.sample_every,
            "mmlu": self.watch.mmlu,
        }
        if given := [name for name, value in asked.items() if value]:
            raise OptionError(f"{', '.join(given)}: expected none in a run of several processes, found some")
        if self.health.on_bad_step == "rollback":
            raise OptionError("on_bad_step: expected stop or skip in a run of several processes, found rollback")

    def _check_method(self) -> None:
        name, method = self.tuning.method, METHODS[self.tuning.method]
        if name == LoRA.name:
            return
        if self.context.longlora:
            raise OptionError(f"longlora: expected method {LoRA.name}, found {name}")
        plain = LoRAOptions()
        shared = set(method.lora_options)
        if "target_modules" in shared:
            shared.add("target_regex")
        given = [
            option for option, value in vars(self.lora).items() if value != getattr(plain, option) and option not in shared
        ]
        if given:
            raise OptionError(f"{', '.join(given)}: expected none with method {name}, found some: they are LoRA's")
        if self.context.groups > 1 and self.method().virtual_tokens:
            raise OptionError(f"attention_groups: expected 1 with virtual tokens ({name}), found {self.context.groups}")
        if method.is_full:
            if self.model.data_type != "none" or self.model.embedding_storage != "none":
                found = f"{self.model.data_type} and {self.model.embedding_storage}"
                raise OptionError(f"data_type, embedding_storage: expected none and none with method {name}, found {found}")
            if self.model.adapter is not None:
                raise OptionError(f"adapter: expected none with method {name}, found {self.model.adapter}; merge it first")
