"""Rotary position embedding (Su et al. 2021) and the scalings of it that checkpoints use.

Pair i of a head's features is rotated by the angle position * f_i, with f_i = theta^(-2i/d). The pairs are (i, i + d/2), as
Hugging Face stores query and key weights. A scaling changes the frequencies f, and some scalings also multiply cosine and
sine by an attention factor:

    default    no change
    linear     f / factor                                                        (position interpolation, Chen et al. 2023)
    dynamic    theta increases when a sequence is longer than the model's context     (NTK-aware scaling by length)
    yarn       f / factor for low frequencies, f for high ones, a ramp between   (Peng et al. 2023), attention factor
    longrope   f / a factor for each pair; the length selects one of two lists   (Ding et al. 2024), attention factor
    llama3     f / factor for wavelengths above a limit, with a smooth transition     (Llama 3.1)

With dynamic and longrope the frequencies depend on the length of the text, so that a token's rotation is not known before
the whole text is. A text is a run of positions that increase by one: each row of a batch, and each document packed into a
row, has the frequencies of its own length, whatever is beside it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from qlora_jax.errors import CheckpointError, UnsupportedError, shortened

_REQUIRED = {  # fields that each scaling needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("long_factor", "short_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


_READ = {  # fields that each scaling reads
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("long_factor", "short_factor", "original_max_position_embeddings", "factor", "attention_factor"),
    "llama3": _REQUIRED["llama3"],
}


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """The rotary position embedding of a model.

    Attributes:
        head_dim: d, the number of rotated features of a head; even.
        theta: base of the wavelengths.
        max_position_embeddings: length of the context, in tokens, from the checkpoint's config.
        scaling: (name, value) of the scaling's fields, including `rope_type`, as in Hugging Face's config.json, sorted.

    Raises:
        UnsupportedError: an unknown scaling type.
        CheckpointError: a field that the scaling needs is missing, or is no number within its bounds.
    """

    head_dim: int
    theta: float
    max_position_embeddings: int
    scaling: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_config(
        cls, head_dim: int, theta: float, max_position_embeddings: int, scaling: Mapping[str, Any] | None
    ) -> "RotaryEmbedding":
        """Return the embedding that the fields of a config.json describe; `scaling` is its `rope_scaling`."""
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in (scaling or {}).items()
            if value is not None
        }
        older = fields.pop("type", "default")  # the name of `rope_type` in older files
        kind = fields.get("rope_type", older)
        # The first Phi-3 called it "su" or, with the same two lists, "yarn".
        both = {"long_factor", "short_factor"} <= fields.keys()
        kind = "longrope" if kind == "su" or (kind == "yarn" and both) else kind
        known = (*_REQUIRED[kind], *_READ[kind]) if isinstance(kind, str) and kind in _READ else ()
        fields = {name: value for name, value in fields.items() if name in known} | {"rope_type": kind}
        return cls(head_dim, theta, max_position_embeddings, tuple(sorted(fields.items())))

    def __post_init__(self) -> None:
        fields = dict(self.scaling)
        kind = fields.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in _REQUIRED:
            raise UnsupportedError(f"rope_type {shortened(kind)} is not supported; expected one of {', '.join(_REQUIRED)}")
        missing = [name for name in _REQUIRED[kind] if name not in fields]
        if missing:
            raise CheckpointError(
                f"rope_type {kind!r} needs the fields {', '.join(missing)}; found {shortened(sorted(fields))}"
            )
        problems = [text for name in _READ[kind] if name in fields and (text := self._problem(name, fields[name]))]
        if not problems:
            problems = self._contradictions(kind, fields)
        if problems:
            raise CheckpointError(f"rope_type {kind!r}: {'; '.join(problems)}")

    def _problem(self, name: str, value: Any) -> str | None:
        """Return what is wrong with the value of a field of the scaling; None where it is right."""
        match name:
            case "truncate":
                expected, right = "true or false", type(value) is bool
            case "original_max_position_embeddings":
                expected, right = "a whole number above 1", type(value) is int and 1 < value < 2**31
            case "long_factor" | "short_factor":
                expected = f"{self.head_dim // 2} numbers above 0"
                right = isinstance(value, tuple) and len(value) == self.head_dim // 2 and all(map(_is_positive, value))
            case "mscale" | "mscale_all_dim":
                expected, right = "a number from 0 on", value == 0 or _is_positive(value)
            case _:
                expected, right = "a number above 0", _is_positive(value)
        return None if right else f"{name}: expected {expected}, found {str(value)[:60]}"

    def _contradictions(self, kind: str, fields: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with numbers that are right each by itself."""
        if kind == "llama3" and fields["low_freq_factor"] >= fields["high_freq_factor"]:
            return [f"expected low_freq_factor below high_freq_factor, found {fields['low_freq_factor']}"]
        if kind == "yarn" and self.theta <= 1:
            return [f"expected rope_theta above 1, found {self.theta}"]
        if kind == "dynamic" and self.head_dim < 4:
            return [f"expected at least 4 rotated features, found {self.head_dim}"]
        if kind == "longrope" and self.context is not None and self.context < 2:
            return [f"expected a context of at least 2 tokens, found {self.context}"]
        return []

    @property
    def context(self) -> int | None:
        """The longest text whose frequencies do not depend on its length; None: those of all texts do not."""
        fields = dict(self.scaling)
        match fields.get("rope_type", "default"):
            case "dynamic":
                return self.max_position_embeddings
            case "longrope":
                return fields.get("original_max_position_embeddings", self.max_position_embeddings)
        return None

    def lasts(self, length: int) -> int | None:
        """Return the length up to which the rotations of a text of `length` tokens remain when it grows; None: always."""
        if self.context is None or length <= self.context:
            return self.context
        return None if dict(self.scaling)["rope_type"] == "longrope" else length

    def __call__(
        self, positions: Int[Array, "b t"], lengths: Int[Array, "b t"] | None = None
    ) -> tuple[Float32[Array, "b t r"], Float32[Array, "b t r"]]:
        """Return float32 (cosine, sine), each `[b, t, head_dim / 2]`.

        Args:
            positions: int32 `[b, t]`.
            lengths: int32 `[b, t]` or `[b, 1]`, the length of the text that each token belongs to; None: the text ends with
                the last of the positions that increase by one.
        """
        frequencies, factor = self._frequencies(positions, lengths)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    def _frequencies(self, positions: Array, lengths: Array | None) -> tuple[Array, float]:
        """Return (float32 frequencies `[head_dim / 2]` or `[b, t, head_dim / 2]`, factor on cosine and sine)."""
        fields = dict(self.scaling)
        kind = fields.get("rope_type", "default")
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        plain = np.float32(1.0) / np.float32(self.theta) ** exponents
        original = fields.get("original_max_position_embeddings", self.max_position_embeddings)
        match kind:
            case "default":
                return jnp.asarray(plain), 1.0
            case "linear":
                return jnp.asarray(plain / np.float32(fields["factor"])), 1.0
            case "llama3":
                return jnp.asarray(_llama3(plain, fields)), 1.0
            case "yarn":
                return jnp.asarray(self._yarn(plain, fields, original)), _yarn_attention_factor(fields)
            case "dynamic":
                lengths = text_lengths(positions) if lengths is None else lengths
                length = jnp.maximum(lengths, self.max_position_embeddings).astype(jnp.float32)[..., None]
                stretch = fields["factor"] * length / self.max_position_embeddings - (fields["factor"] - 1)
                theta = self.theta * stretch ** (self.head_dim / (self.head_dim - 2))
                return 1.0 / theta ** jnp.asarray(exponents)[None, None], 1.0
            case _:  # longrope
                lengths = text_lengths(positions) if lengths is None else lengths
                short, long = (np.asarray(fields[name], np.float32) for name in ("short_factor", "long_factor"))
                factors = jnp.where((lengths > original)[..., None], long[None, None], short[None, None])
                factor = fields.get("factor", self.max_position_embeddings / original)
                default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
                return jnp.asarray(plain)[None, None] / factors, fields.get("attention_factor", default)

    def _yarn(self, plain: np.ndarray, fields: Mapping[str, Any], original: int) -> np.ndarray:
        def pair_of(rotations: float) -> float:  # the pair that makes this many rotations within the original context
            return self.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_of(fields.get("beta_fast", 32)), pair_of(fields.get("beta_slow", 1))
        if fields.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(self.head_dim // 2, dtype=np.float32) - low) / np.float32(width), 0, 1)
        return (plain / np.float32(fields["factor"]) * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_attention_factor(fields: Mapping[str, Any]) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if fields["factor"] <= 1 else 0.1 * scale * math.log(fields["factor"]) + 1.0

    if "attention_factor" in fields:
        return float(fields["attention_factor"])
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return magnitude(fields["mscale"]) / magnitude(fields["mscale_all_dim"])
    return magnitude(1.0)


def _llama3(plain: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    factor, low, high = (np.float32(fields[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = np.float32(fields["original_max_position_embeddings"])
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    slow, fast = wavelength > original / low, wavelength < original / high
    return np.where(slow, plain / factor, np.where(fast, plain, between)).astype(np.float32)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def text_lengths(positions: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Return, for each token, the length of its text: the last of the positions that increase by one from it on, plus one.

    Args:
        positions: int32 `[b, t]`, each text's from 0 (or from the number of virtual tokens) on.
    """
    count = positions.shape[1]
    last = jnp.concatenate([positions[:, 1:] != positions[:, :-1] + 1, jnp.ones((positions.shape[0], 1), bool)], axis=1)
    ends = jax.lax.cummin(jnp.where(last, jnp.arange(count, dtype=jnp.int32)[None], count - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions, ends, axis=1) + 1


def rotate(
    x: Float[Array, "b t heads d"], cosine: Float32[Array, "b t r"], sine: Float32[Array, "b t r"]
) -> Float[Array, "b t heads d"]:
    """Rotate the pairs (i, i + r/2) of the first r features of each head, in float32; r <= d.

    Args:
        x: `[b, t, heads, d]`.
        cosine: float32 `[b, t, r/2]`, cosines of the angles.
        sine: float32 `[b, t, r/2]`, sines of the angles.

    Returns:
        `[b, t, heads, d]` in the dtype of x.
    """
    half = cosine.shape[-1]
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate([*rotated, rest], axis=-1).astype(x.dtype)
