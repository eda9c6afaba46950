"""Which method of fine-tuning a run takes, and the options of those that are not LoRA."""

import dataclasses
from typing import Literal, get_args

from qlora_jax.peft import IA3, Method, PrefixTuning, PromptTuning, PTuning
from qlora_jax.peft.prompt_tuning import PromptInit

MethodName = Literal["lora", "full", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
_VIRTUAL: tuple[MethodName, ...] = ("prompt-tuning", "p-tuning", "prefix-tuning")
_INITS: dict[str, PromptInit] = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}
# The methods that each option is for.
_OF: dict[str, tuple[MethodName, ...]] = {
    "virtual_tokens": _VIRTUAL,
    "prompt_init": ("prompt-tuning",),
    "prompt_init_text": ("prompt-tuning",),
    "prompt_encoder": ("p-tuning",),
    "encoder_layers": ("p-tuning",),
    "encoder_dropout": ("p-tuning",),
    "encoder_hidden_size": ("p-tuning", "prefix-tuning"),
    "prefix_projection": ("prefix-tuning",),
    "feedforward_modules": ("ia3",),
}


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """The method."""

    method: MethodName = "lora"
    """lora: adapters on linear layers; full: all parameters of a decoder that is held dense (data-type none), saved as a
    model; ia3: vectors that scale what linear layers give or take (on PEFT's usual ones if target-modules is left out);
    prompt-tuning, p-tuning: virtual tokens before the others; prefix-tuning: keys and values of such in every layer."""
    virtual_tokens: int | None = None
    """Of prompt-tuning, p-tuning and prefix-tuning: how many; 20 if left out."""
    prompt_init: Literal["random", "vocabulary", "text"] = "random"
    """What virtual tokens of prompt-tuning start from: a normal distribution, rows of the token table drawn at random, or
    those of a text."""
    prompt_init_text: str | None = None
    """That text."""
    prompt_encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes the virtual tokens of p-tuning."""
    encoder_layers: int = PTuning.layers
    """Layers of the LSTM."""
    encoder_dropout: float = PTuning.dropout
    """Share that is dropped between the layers of the LSTM while training."""
    encoder_hidden_size: int | None = None
    """Features within the encoder of p-tuning or of prefix-projection; as many as it makes of a token if left out."""
    prefix_projection: bool = False
    """Let an MLP make the keys and values of prefix-tuning."""
    feedforward_modules: tuple[str, ...] = ()
    """Ends of names of linear layers whose input ia3 scales, not their output; PEFT's usual ones if left out."""

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise ValueError(f"method: expected one of {', '.join(METHOD_NAMES)}, found {self.method!r}")
        given = [name for name in _OF if getattr(self, name) != getattr(TuningOptions, name)]
        problems = []
        for name in given:
            if self.method not in _OF[name]:
                found, methods = getattr(self, name), ", ".join(_OF[name])
                problems.append(f"{name}: expected none with method {self.method}, found {found!r}; it is for {methods}")
        if self.prompt_encoder != "lstm":
            found = [name for name in given if name in ("encoder_layers", "encoder_dropout") and self.method == "p-tuning"]
            problems += [f"{name}: expected prompt_encoder lstm beside it, found {self.prompt_encoder}" for name in found]
        if self.method == "prefix-tuning" and self.encoder_hidden_size is not None and not self.prefix_projection:
            problems.append("encoder_hidden_size: expected prefix_projection beside it, found none")
        if problems:
            raise ValueError("; ".join(problems))
        if self.method in _VIRTUAL:
            self.virtual()  # for its own errors

    def virtual(self) -> PromptTuning | PTuning | PrefixTuning:
        """The method of virtual tokens that they describe; raises ValueError where they describe none."""
        count = PromptTuning.virtual_tokens if self.virtual_tokens is None else self.virtual_tokens
        if self.method == "prefix-tuning":
            return PrefixTuning(count, self.prefix_projection, self.encoder_hidden_size)
        if self.method == "p-tuning":
            lstm = self.prompt_encoder == "lstm"
            size, layers, dropout = self.encoder_hidden_size, self.encoder_layers, self.encoder_dropout
            return PTuning(count, "LSTM" if lstm else "MLP", size, layers, dropout)
        return PromptTuning(count, _INITS[self.prompt_init], self.prompt_init_text)


def own_rate(method: Method) -> float | None:
    """The learning rate of a method whose rate does not follow from the size of the model; None for others.

    That of IA3 is its paper's; those of virtual tokens are as in PEFT's examples, lower where an encoder trains.
    """
    match method:
        case IA3():
            return 3e-3
        case PromptTuning():
            return 3e-2
        case PTuning():
            return 1e-3 if method.encoded else 1e-2
        case PrefixTuning():
            return 1e-3 if method.projection and method.encoded else 1e-2
        case _:
            return None
