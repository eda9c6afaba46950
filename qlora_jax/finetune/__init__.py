"""The main job, from options to an adapter."""

from qlora_jax.finetune.job import finetune
from qlora_jax.finetune.options.data import DataOptions
from qlora_jax.finetune.options.lora import LoRAOptions
from qlora_jax.finetune.options.model import ModelOptions
from qlora_jax.finetune.options.objective import ObjectiveOptions
from qlora_jax.finetune.options.optimizer import OptimizerOptions
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.options.reporting import WatchOptions
from qlora_jax.finetune.options.run import RunOptions
from qlora_jax.finetune.options.tuning import MethodName, TuningOptions

__all__ = [
    "DataOptions",
    "LoRAOptions",
    "MethodName",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimizerOptions",
    "Options",
    "RunOptions",
    "TuningOptions",
    "WatchOptions",
    "finetune",
]
