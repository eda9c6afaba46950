"""Many runs at once over one base: `train_many(ManyOptions(…))`, or its stages one by one (run.py)."""

from qlora_jax.finetune.tenants.options import ManyOptions
from qlora_jax.finetune.tenants.run import train_many

__all__ = ["ManyOptions", "train_many"]
