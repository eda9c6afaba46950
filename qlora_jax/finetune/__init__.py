"""The main job, from options to an adapter."""

from qlora_jax.finetune.job import finetune
from qlora_jax.finetune.method_options import MethodName, TuningOptions
from qlora_jax.finetune.options import (
    DataOptions,
    LoRAOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    Options,
    RunOptions,
)
from qlora_jax.finetune.watch_options import WatchOptions

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
