"""Methods of parameter-efficient fine-tuning, one file each, on the layers of `nn`."""

from qlora_jax.peft.dora import DoRALinear, DoRASpec
from qlora_jax.peft.full import FullFineTuning
from qlora_jax.peft.ia3 import IA3, IA3Linear
from qlora_jax.peft.initialization import reads_weights
from qlora_jax.peft.lora import LoRA
from qlora_jax.peft.lora_linear import LoRALinear, LoRASpec, lora_update
from qlora_jax.peft.method import AdapterModule, FieldErrors, FilePart, Method, ModelShape, OfModel, ScalesBias
from qlora_jax.peft.p_tuning import PTuning
from qlora_jax.peft.prefix_tuning import PrefixTuning
from qlora_jax.peft.prompt import Prompt, PromptMethod, PromptShape
from qlora_jax.peft.prompt_tuning import PromptTuning
from qlora_jax.peft.targets import ALL_LINEAR, module_matches

# The methods by PEFT's names (`peft_type`). A new method is one file and one line here.
METHODS: dict[str, type[Method]] = {
    "LORA": LoRA,
    "IA3": IA3,
    "PROMPT_TUNING": PromptTuning,
    "P_TUNING": PTuning,
    "PREFIX_TUNING": PrefixTuning,
}

__all__ = [
    "ALL_LINEAR",
    "IA3",
    "METHODS",
    "AdapterModule",
    "DoRALinear",
    "DoRASpec",
    "FieldErrors",
    "FilePart",
    "FullFineTuning",
    "IA3Linear",
    "LoRA",
    "LoRALinear",
    "LoRASpec",
    "Method",
    "ModelShape",
    "OfModel",
    "PTuning",
    "PrefixTuning",
    "Prompt",
    "PromptMethod",
    "PromptShape",
    "PromptTuning",
    "ScalesBias",
    "lora_update",
    "module_matches",
    "reads_weights",
]
