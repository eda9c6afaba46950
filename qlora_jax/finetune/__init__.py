"""The main job, from options to an adapter."""

from qlora_jax.finetune.job import finetune
from qlora_jax.finetune.options.options import (
    DataOptions,
    LoRAOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    Options,
    RunOptions,
)
from qlora_jax.finetune.options.reporting import WatchOptions
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
