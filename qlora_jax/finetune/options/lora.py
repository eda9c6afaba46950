"""The options of LoRA, some of which other methods take as well (`Method.lora_options`)."""

import dataclasses
from typing import Any

from qlora_jax.errors import OptionError
from qlora_jax.peft import ALL_LINEAR, LoRA
from qlora_jax.peft.method import Bias


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """The adapter of LoRA."""

    rank: int = LoRA.rank
    """r, the inner size of the adapter."""
    alpha: float = LoRA.alpha
    """The adapter's output is scaled by alpha / r."""
    dropout: float = LoRA.dropout
    """Share of the adapter's inputs that is zeroed while training."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Names of linear layers, the token embedding or the output head, or the last parts of names; all-linear: every linear
    layer but the output head."""
    target_regex: str | None = None
    """One regular expression over whole module names, instead of target-modules."""
    use_rslora: bool = LoRA.use_rslora
    """Scale by alpha / sqrt(r)."""
    use_dora: bool = LoRA.use_dora
    """DoRA: train the lengths of the weights' columns by themselves."""
    init_lora_weights: str | None = None
    """Initialization of A and B, by PEFT's names: gaussian or orthogonal; pissa, pissa_niter_N, olora or loftq, from the
    original weights; eva, from the training data. If left out, A is uniform and B zero."""
    loftq_iter: int = LoRA.loftq_iter
    """Iterations of LoftQ."""
    exclude_modules: tuple[str, ...] = ()
    """Names, or last parts of names, of linear layers that get no adapter although they are targets."""
    layers_to_transform: tuple[int, ...] = ()
    """Numbers of the layers that get an adapter; all of them if left out."""
    layers_pattern: tuple[str, ...] = ()
    """Names of the lists of layers (such as layers) in which layers-to-transform counts; any list if left out."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ranks of single modules: a regular expression over the last parts of a name, then r, and so on in pairs."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Alphas of single modules, in the same form."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of the names of embeddings, heads, norms and linear layers that are trained as a whole and saved."""
    bias: Bias = LoRA.bias
    """Biases of the base that are trained: lora_only, those of the linear layers with an adapter; all."""
    lora_bias: bool = LoRA.lora_bias
    """Give B a bias, which is trained too."""
    ensure_weight_tying: bool = LoRA.ensure_weight_tying
    """Keep a head tied to the token embedding when one of the two is a target or trained as a whole."""
    trainable_token_indices: tuple[int, ...] = ()
    """Tokens whose embeddings are trained; where the head is tied to the embedding, its rows too."""
    special_tokens: tuple[str, ...] = ()
    """Tokens to add to the tokenizer, which is saved beside the adapter; their rows of the embedding and the head are
    trained."""

    def values(self) -> dict[str, Any]:
        """Return the fields of `LoRA` by name, in the form in which methods hold them.

        Raises:
            OptionError: targets are given both by name and by a regular expression.
        """
        if self.target_regex is not None and self.target_modules != (ALL_LINEAR,):
            raise OptionError("target_modules and target_regex: expected one of them, found both")
        values = {name: getattr(self, name) for name in LoRA.lora_options}
        if self.target_regex is not None:
            values["target_modules"] = self.target_regex
        elif self.target_modules == (ALL_LINEAR,):
            values["target_modules"] = ALL_LINEAR
        if self.init_lora_weights is None:
            values["init_lora_weights"] = LoRA.init_lora_weights
        return {name: tuple(value.items()) if isinstance(value, dict) else value for name, value in values.items()}

    def build(self) -> LoRA:
        """Return the adapter that the options describe; raise OptionError where they contradict each other."""
        return LoRA.from_options(self.values())
