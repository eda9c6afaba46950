"""Methods of parameter-efficient fine-tuning, one file each, on the layers of `nn`; `method.py` is their interface."""

from qlora_jax.peft.bank import Bank, clear_slot, split_bank, write_slot
from qlora_jax.peft.dora import DoRALinear, DoRASpec
from qlora_jax.peft.full import FullFineTuning, FullLinearSpec
from qlora_jax.peft.ia3 import IA3, IA3Linear
from qlora_jax.peft.initialization import reads_weights
from qlora_jax.peft.lora import LoRA
from qlora_jax.peft.lora_linear import LoRALinear, LoRASpec, LowRankAdapter, lora_update
from qlora_jax.peft.method import EMBEDDING_KEYS, AdapterModule, FieldErrors, FilePart, Method, ModelShape
from qlora_jax.peft.option import Option, by_name, option_problems
from qlora_jax.peft.p_tuning import PTuning
from qlora_jax.peft.prefix_tuning import PrefixTuning
from qlora_jax.peft.prompt import Prompt, PromptMethod, PromptShape
from qlora_jax.peft.prompt_tuning import PromptTuning
from qlora_jax.peft.subtracted import Subtracted
from qlora_jax.peft.targets import ALL_LINEAR, module_matches

# Every method by its name on the command line. A new method is one file of this package and one line here.
METHODS: dict[str, type[Method]] = {
    LoRA.name: LoRA,
    FullFineTuning.name: FullFineTuning,
    IA3.name: IA3,
    PromptTuning.name: PromptTuning,
    PTuning.name: PTuning,
    PrefixTuning.name: PrefixTuning,
}


def peft_methods() -> dict[str, type[Method]]:
    """Return the methods that PEFT's files can hold, by PEFT's names."""
    return {method.peft_type: method for method in METHODS.values() if not method.is_full}


__all__ = [
    "ALL_LINEAR",
    "EMBEDDING_KEYS",
    "IA3",
    "METHODS",
    "AdapterModule",
    "Bank",
    "DoRALinear",
    "DoRASpec",
    "FieldErrors",
    "FilePart",
    "FullFineTuning",
    "FullLinearSpec",
    "IA3Linear",
    "LoRA",
    "LoRALinear",
    "LoRASpec",
    "LowRankAdapter",
    "Method",
    "ModelShape",
    "Option",
    "PTuning",
    "PrefixTuning",
    "Prompt",
    "PromptMethod",
    "PromptShape",
    "PromptTuning",
    "Subtracted",
    "by_name",
    "clear_slot",
    "lora_update",
    "module_matches",
    "option_problems",
    "peft_methods",
    "reads_weights",
    "split_bank",
    "write_slot",
]
