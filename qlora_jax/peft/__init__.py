"""Methods of parameter-efficient fine-tuning, one file each, on the layers of `nn`."""

from qlora_jax.peft.dora import DoRALinear, DoRASlot
from qlora_jax.peft.full import FullFineTuning
from qlora_jax.peft.lora import LoRA
from qlora_jax.peft.lora_linear import LoRALinear, Slot, lora_update
from qlora_jax.peft.method import AdapterModule, FieldErrors, FilePart, Method
from qlora_jax.peft.start import reads_weights
from qlora_jax.peft.targets import ALL_LINEAR, module_matches

# By PEFT's names. A new method is a file and a line here.
METHODS: dict[str, type[Method]] = {"LORA": LoRA}

__all__ = [
    "ALL_LINEAR",
    "METHODS",
    "AdapterModule",
    "DoRALinear",
    "DoRASlot",
    "FieldErrors",
    "FilePart",
    "FullFineTuning",
    "LoRA",
    "LoRALinear",
    "Method",
    "Slot",
    "lora_update",
    "module_matches",
    "reads_weights",
]
