"""Many runs at once over one base: `train_many(ManyOptions(…))`, or its stages one by one (run.py)."""

from qlora_jax.finetune.tenants.options import ManyOptions
from qlora_jax.finetune.tenants.run import train_many
from qlora_jax.finetune.tenants.tenant import pause, unpause

__all__ = ["ManyOptions", "pause", "train_many", "unpause"]
