"""The kinds and bounds of the fields of config.json and generation_config.json, checked where a field is read.

A damaged or invented file must not decide how much memory or time reading it takes, nor fail somewhere in the arithmetic.
So a size is a whole number (4096.0 is none), a factor is a positive finite number, and both have a largest value, which is
far above that of any model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_jax.errors import CheckpointError, shortened

__all__ = ["BOUNDS", "TOKEN_IDS", "Bound", "check_generation", "token_ids"]

Kind = Literal["size", "number", "amount", "flag", "text", "texts", "flags", "object", "ids"]
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class Bound:
    """What a field may be.

    Attributes:
        kind: "size": a whole number; "number": a finite number above 0; "amount": one from 0 on; "flag"; "text"; "texts",
            "flags": lists; "object"; "ids": the id of a token, or a list of them (-1, which some files have, is none).
        most: the largest value of a size or a number, the largest length of a list.
        least: the smallest value of a size or an id.
    """

    kind: Kind
    most: float = math.inf
    least: int = 1

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value; None where it is right."""
        match self.kind:
            case "size":
                expected = f"a whole number from {self.least} to {self.most}"
                right = type(value) is int and self.least <= value <= self.most
            case "number":
                expected = "a number above 0" + (f", at most {self.most:g}" if self.most < math.inf else "")
                right = type(value) in (int, float) and 0 < value <= self.most and value < math.inf
            case "amount":
                expected, right = (
                    f"a number from 0 to {self.most:g}",
                    type(value) in (int, float) and 0 <= value <= self.most,
                )
            case "ids":
                ids = value if isinstance(value, list) else [value]
                expected = f"ids of tokens, whole numbers from {self.least} to {_LONGEST}"
                right = len(ids) <= self.most and all(
                    type(index) is int and self.least <= index <= _LONGEST for index in ids
                )
            case "flag":
                expected, right = "true or false", type(value) in (bool, int) and value in (0, 1)
            case "text":
                expected, right = "a text", isinstance(value, str)
            case "texts":
                expected, right = "a list of texts", _is_list(value, (str,), self.most)
            case "flags":
                expected, right = "a list of 0 and 1", _is_list(value, (bool, int), self.most)
            case "object":
                expected, right = "an object", isinstance(value, dict)
        return None if right else f"expected {expected}, found {shortened(value)}"

    @property
    def stand_in(self) -> Any:
        """A value with which reading goes on, to find all that is wrong; the error comes afterwards."""
        of_kind = {"size": self.least, "number": 1.0, "amount": 0.0, "flag": False, "text": "", "object": {}}
        return of_kind.get(self.kind, [])


def _is_list(value: Any, kinds: tuple[type, ...], most: float) -> bool:
    return isinstance(value, list | tuple) and len(value) <= most and all(type(item) in kinds for item in value)


_LAYERS, _WIDTH, _HEADS = Bound("size", 2**12), Bound("size", 2**22), Bound("size", 2**14)
_LENGTH, _POSITIVE, _FRACTION = Bound("size", _LONGEST), Bound("number", 1e12), Bound("number", 1.0)
_FLAG, _TEXT, _ID = Bound("flag"), Bound("text"), Bound("size", _LONGEST, 0)
_IDS, _ENDS = Bound("ids", 1000, -1), Bound("ids", 1000, 0)

BOUNDS: dict[str, Bound] = {
    "vocab_size": Bound("size", 2**24),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "d_model": _WIDTH,
    "d_ff": _WIDTH,
    "head_dim": _HEADS,
    "d_kv": _HEADS,
    "num_hidden_layers": _LAYERS,
    "num_layers": _LAYERS,
    "num_decoder_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "num_heads": _HEADS,
    "max_position_embeddings": _LENGTH,
    "original_max_position_embeddings": _LENGTH,
    "sliding_window": _LENGTH,
    "sliding_window_pattern": _LENGTH,
    "max_window_layers": Bound("size", _LONGEST, 0),
    "no_rope_layer_interval": _LENGTH,
    "relative_attention_num_buckets": Bound("size", 2**16),
    "relative_attention_max_distance": _LENGTH,
    "decoder_start_token_id": _ID,
    "pad_token_id": _ID,
    "rms_norm_eps": _FRACTION,
    "layer_norm_eps": _FRACTION,
    "layer_norm_epsilon": _FRACTION,
    "rope_theta": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "rotary_emb_base": _POSITIVE,
    "partial_rotary_factor": _FRACTION,
    "rotary_pct": _FRACTION,
    "query_pre_attn_scalar": _POSITIVE,
    "attn_logit_softcapping": _POSITIVE,
    "final_logit_softcapping": _POSITIVE,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "use_sliding_window": _FLAG,
    "use_parallel_residual": _FLAG,
    "scale_decoder_outputs": _FLAG,
    "hidden_act": _TEXT,
    "hidden_activation": _TEXT,
    "feed_forward_proj": _TEXT,
    "layer_types": Bound("texts", 2**13),
    "no_rope_layers": Bound("flags", 2**13),
    "rope_parameters": Bound("object"),
    "rope_scaling": Bound("object"),
}

# Ids that any config.json may hold, whether its family reads them or not: other programs stop or pad by them.
TOKEN_IDS = dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), _IDS) | {"eos_token_id": _ENDS}

# The fields of generation_config.json that hold numbers.
_GENERATION: dict[str, Bound] = {
    **TOKEN_IDS,
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), _IDS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), Bound("ids", 2**16, -1)),
    "do_sample": _FLAG,
    "temperature": Bound("amount", 1e6),
    **dict.fromkeys(("top_p", "min_p", "typical_p"), Bound("amount", 1.0)),
    "repetition_penalty": _POSITIVE,
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "max_length", "min_length", "num_beams"), Bound("size", _LONGEST, 0)),
}


def check_generation(place: object, values: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a field of generation_config.json is of another kind or beyond its bounds."""
    checked = {name: bound for name, bound in _GENERATION.items() if values.get(name) is not None}
    if problems := [f"{name}: {text}" for name, bound in checked.items() if (text := bound.problem(values[name]))]:
        raise CheckpointError(f"{place}: {'; '.join(problems)}")


def token_ids(place: object, values: Mapping[str, Any], name: str = "eos_token_id") -> list[int]:
    """Return the ids in a field that holds the id of a token that ends a text, a list of them, or nothing.

    Raises:
        CheckpointError: they are no ids of tokens.
    """
    value = values.get(name)
    if value is None:
        return []
    if problem := _ENDS.problem(value):
        raise CheckpointError(f"{place}: {name}: {problem}")
    return value if isinstance(value, list) else [value]
