"""A training run: `finetune(Options(…))`, or its stages one by one (`prepare`, `train` and `finish`, see run.py)."""

import sys
from pathlib import Path
from types import ModuleType

from qlora_jax.finetune.options.data import DataOptions
from qlora_jax.finetune.options.health import HealthOptions
from qlora_jax.finetune.options.lora import LoRAOptions
from qlora_jax.finetune.options.model import ModelOptions
from qlora_jax.finetune.options.objective import ObjectiveOptions
from qlora_jax.finetune.options.optimizer import OptimizerOptions
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.options.reporting import WatchOptions
from qlora_jax.finetune.options.run import RunOptions
from qlora_jax.finetune.options.tuning import MethodName, TuningOptions
from qlora_jax.finetune.run import finetune

__all__ = [
    "DataOptions",
    "HealthOptions",
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


class _CallablePackage(ModuleType):
    """Lets the package be called as the function of its name.

    `import qlora_jax as qj` makes `qj.finetune` this package, as soon as anything has imported it, and a user calls
    `qj.finetune(qj.Options(…))`.
    """

    def __call__(self, options: Options, *, progress: bool = True) -> Path:
        return finetune(options, progress=progress)


sys.modules[__name__].__class__ = _CallablePackage
