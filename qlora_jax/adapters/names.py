"""The names of the tensors in an adapter's files, which are PEFT's.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight               PREFIX, module, suffix of the method
base_model.model.model.norm.weight                                           PREFIX, name of a parameter
base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta     PREFIX, module, ROWS
"""

from collections.abc import Iterable, Sequence

from qlora_jax.peft import Method
from qlora_jax.peft.prompt import EMBEDDINGS

__all__ = ["PREFIX", "ROWS", "adapted_modules", "in_text_part", "peft_name", "rows_name", "split_name", "tensor_name"]

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"


def tensor_name(module: str, suffix: str) -> str:
    """Return the name of a tensor of a module's adapter, e.g. of "model.layers.0.self_attn.q_proj" and "lora_A.weight"."""
    return f"{PREFIX}{module}.{suffix}"


def rows_name(module: str) -> str:
    """Return the name of the trained rows of a token embedding or head, e.g. of "model.embed_tokens"."""
    return f"{PREFIX}{module}{ROWS}"


def split_name(tensor: str, method: Method) -> tuple[str, str | None]:
    """Return (full name of the module, suffix) of a tensor of an adapter; (the name, None) of any other tensor."""
    for suffix in method.suffixes:
        if tensor == EMBEDDINGS == suffix:  # belongs to the model as a whole
            return "", suffix
        if tensor.endswith("." + suffix):
            return tensor.removeprefix(PREFIX).removesuffix("." + suffix), suffix
    return tensor, None


def adapted_modules(tensors: Iterable[str], method: Method) -> list[str]:
    """Return the full names of the modules whose adapters have tensors of these names."""
    split = [split_name(name, method) for name in tensors]
    return list(dict.fromkeys(module for module, suffix in split if suffix is not None and module))


def peft_name(tensor: str, adapted: Sequence[str]) -> str:
    """Return the name under which PEFT loads a tensor: it moves the bias of an adapted module into `base_layer`."""
    module = tensor.removeprefix(PREFIX).removesuffix(".bias")
    return f"{PREFIX}{module}.base_layer.bias" if tensor.endswith(".bias") and module in adapted else tensor


def in_text_part(name: str, prefix: str) -> str:
    """Return the name of a tensor or module of a language model within a model that also reads pictures or sound."""
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name
