"""The configuration of a decoder-only model, and reading it from Hugging Face's config.json.

Every decoder here is one module (models/decoder.py) with a few options. A family is a function that converts its config.json
to a `DecoderConfig`, including the parameter mappings. Missing fields have the family's defaults, because transformers
writes only fields that differ from its defaults.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qlora_jax.errors import CheckpointError, QLoRAError, shortened
from qlora_jax.models.bounds import BOUNDS, TOKEN_IDS
from qlora_jax.models.parameter_mapping import ParameterMapping
from qlora_jax.nn import Activation, RotaryEmbedding

Fused = Literal["no", "blocks", "heads"]
ACTIVATIONS: dict[str, Activation] = {  # by transformers' names
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """The properties of attention that may differ between layers.

    Attributes:
        rope: rotary position embedding of queries and keys; None: no position embedding (NoPE).
        window: number of tokens that a token attends to, including itself; None: all earlier tokens.
    """

    rope: RotaryEmbedding | None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and options of a decoder-only language model.

    Fields that are not described here have the meaning of the same field of Hugging Face's config.json.

    Attributes:
        family: the model_type of config.json.
        parameter_mappings: names of the parameters in checkpoints.
        kinds: the kinds of attention that occur.
        layer_kinds: for each layer, the index of its kind in `kinds`.
        norm: "rms", "rms+1" (the weight is an offset from 1) or "layer" (with mean and bias).
        fused: whether one matrix computes queries, keys and values: "no"; "blocks": yes, one after the other, and another
            computes gate and up of the feed-forward; "heads": yes, interleaved by head.
        query_key_norm: whether queries and keys are normalized per head before the rotation.
        score_scale: factor on q·k; None: head_dim ** -0.5.
        score_cap, logit_cap: scores or logits x become cap * tanh(x / cap); None: no cap.
        glu: whether the feed-forward is a gated linear unit.
        parallel: whether attention and feed-forward both read the layer's input.
        post_norms: whether the results of attention and feed-forward are normalized before they are added.
        embedding_scale: factor on the embeddings.
    """

    family: str
    parameter_mappings: tuple[ParameterMapping, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    kinds: tuple[AttentionKind, ...]
    layer_kinds: tuple[int, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    norm: Literal["rms", "rms+1", "layer"] = "rms"
    activation: Activation = "silu"
    fused: Fused = "no"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    glu: bool = True
    parallel: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0

    @property
    def by_length(self) -> bool:
        """Whether the rotations of a text depend on its length."""
        return any(kind.rope is not None and kind.rope.context is not None for kind in self.kinds)

    @property
    def endless(self) -> bool:
        """Whether the positions allow sequences of any length."""
        return any(kind.rope is not None and dict(kind.rope.scaling).get("rope_type") == "dynamic" for kind in self.kinds)


class Fields:
    """Reader of the fields of a config.json that collects all problems.

    Attributes:
        model: name of the model for messages.
        problems: messages about the invalid fields found so far.
        family: the model_type.
        values: the fields, with defaults for missing ones.
    """

    def __init__(self, model: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.model, self.problems = model, []
        self.family: str = config.get("model_type") or model
        given = {name: value for name, value in config.items() if value is not None}
        self.values: dict[str, Any] = {**defaults, **given}

    def __getitem__(self, name: str) -> Any:
        """Return a required field; if it is missing or out of its bounds, record a problem and return a stand-in."""
        value = self.values.get(name)
        if value is None:
            self._record(f"{name} is missing")
            return BOUNDS[name].stand_in if name in BOUNDS else 1
        return self.checked(name, value)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an optional field; if it is out of its bounds, record a problem and return a stand-in."""
        value = self.values.get(name, default)
        return None if value is None else self.checked(name, value)

    def checked(self, name: str, value: Any) -> Any:
        """Return a value if it is within the bounds of the field `name`; else record a problem and return a stand-in."""
        bound = BOUNDS.get(name)
        if bound is None or (problem := bound.problem(value)) is None:
            return value
        self._record(f"{name}: {problem}")
        return bound.stand_in

    def _record(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def expect(self, name: str, supported: Any) -> None:
        """Record a problem if the field is present and its value is not the only supported one."""
        if (value := self.values.get(name, supported)) != supported:
            self._record(f"{name}: expected {supported!r}, found {shortened(value)}")

    def check(self) -> None:
        """Raise CheckpointError with all problems, if there are any."""
        for name, bound in TOKEN_IDS.items():  # whether the family reads them or not
            known = self.values.get(name) is None or any(problem.startswith(f"{name}:") for problem in self.problems)
            if not known and (problem := bound.problem(self.values[name])):
                self._record(f"{name}: {problem}")
        if self.problems:
            raise CheckpointError(f"config.json of a {self.model} model: {'; '.join(self.problems)}")

    def activation(self, name: str) -> Activation:
        """Return the activation that a field names."""
        value = self[name]
        if value not in ACTIVATIONS:
            self._record(f"{name}: expected one of {', '.join(ACTIVATIONS)}, found {shortened(value)}")
        return ACTIVATIONS.get(value, "silu")

    def rope(self, head_dim: int, *, of: str | None = None) -> RotaryEmbedding:
        """Return the rotary position embedding, or that of one type of layers (`of`) if the file distinguishes types.

        transformers 5 stores theta and scaling together in rope_parameters; older files store them in separate fields.
        """
        scaling = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        if of is not None and of in scaling:
            scaling = dict(self.checked("rope_parameters", scaling[of] or {}))
        if of != "sliding_attention":  # to which the older field does not apply
            self._compare_older_scaling(scaling)
        theta = float(self.checked("rope_theta", scaling.pop("rope_theta", None) or self.get("rope_theta") or 10000.0))
        partial = scaling.pop("partial_rotary_factor", None) or self.get("partial_rotary_factor", 1.0)
        rotated = int(head_dim * self.checked("partial_rotary_factor", partial))
        if rotated < 2 or rotated % 2:
            if not self.problems:  # else it follows from a size that is wrong or missing
                self._record(f"head_dim: expected an even number of rotated features, found {rotated}")
            rotated = 2
        if (original := self.get("original_max_position_embeddings")) is not None:
            scaling.setdefault("original_max_position_embeddings", original)
        try:
            return RotaryEmbedding.from_config(rotated, theta, self["max_position_embeddings"], scaling)
        except QLoRAError as error:
            self._record(str(error))
            return RotaryEmbedding.from_config(2, theta, 1, None)

    def _compare_older_scaling(self, scaling: Mapping[str, Any]) -> None:
        """Record a problem where a file has both rope_parameters and rope_scaling, and they are not the same.

        The field of older versions is often added by hand, to lengthen the context; transformers then forgets the other one.
        """
        older = {} if not self.get("rope_parameters") else dict(self.get("rope_scaling") or {})
        ours, theirs = ({**fields, "rope_type": _rope_type(fields)} for fields in (scaling, older))
        differ = [name for name, value in theirs.items() if name != "type" and ours.get(name) != value]
        if older and differ:
            self._record(
                f"rope_scaling: expected the same as rope_parameters, or only one of the two, found {shortened(older)} and "
                f"{shortened(dict(scaling))}; write the values that are meant into rope_parameters"
            )

    def sizes(self) -> dict[str, Any]:
        """Return the fields of `DecoderConfig` that have the same names in all families."""
        heads, hidden = self["num_attention_heads"], self["hidden_size"]
        kv_heads = self.get("num_key_value_heads", heads)
        if heads % kv_heads:
            self._record(f"{heads} attention heads are no multiple of {kv_heads} key-value heads")
        head_dim = self.get("head_dim", hidden // heads)
        if head_dim < 1:
            self._record(f"head_dim: expected at least 1, found {hidden} features for {heads} attention heads")
        return {
            "vocab_size": self["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": self["intermediate_size"],
            "num_hidden_layers": self["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": max(head_dim, 1),
            "max_position_embeddings": self["max_position_embeddings"],
            "tie_word_embeddings": self.get("tie_word_embeddings", False),
        }

    def layer_types(self, default: Sequence[str]) -> Sequence[str]:
        """Return the type of each layer: "full_attention" or "sliding_attention"."""
        types = self.get("layer_types", default)
        wrong = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
        if wrong:
            found = shortened(", ".join(wrong[:8]))
            self._record(f"layer_types: expected full_attention or sliding_attention, found {found}")
        if len(types) != self["num_hidden_layers"]:
            self._record(f"layer_types: expected {self['num_hidden_layers']} of them, found {len(types)}")
        return types


def _rope_type(fields: Mapping[str, Any]) -> Any:
    kind = fields.get("rope_type", fields.get("type", "default"))
    return "longrope" if kind == "su" else kind


def kinds_of(layers: Sequence[AttentionKind]) -> dict[str, Any]:
    """Return the fields `kinds` and `layer_kinds` of `DecoderConfig` for a list with the attention of each layer."""
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "layer_kinds": tuple(kinds.index(layer) for layer in layers)}
