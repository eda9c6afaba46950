"""A bank: the LoRA adapters of many tenants beside one frozen base, one of them for each row of a batch.

    lora_a [layers, K, r, in]   lora_b [layers, K, r, out]   scale [layers, K]         of each adapted stack of linear layers
    y[row] = x[row] W (+ bias) + scale[id] * (x[row] A[id]') B[id]                     id = adapter_ids[row], 0 <= id < K

Slot 0 is the bare base: it stays zero, as every slot does that is not in use. r is the rank of the bank. The rows of A
and B beyond an adapter's own rank are zero, which is exact, and their gradients are zero: that of A contains B, and
that of B contains A. A module that an adapter does not target has zeros and the scale 0.

How to use it (a server or a trainer does all of this; none of it compiles anything after its first call):

    model = open_pretrained(base, method=Bank(64, 16, dtype)).load()           K = 64 with slot 0; all slots are empty
    graphdef, bank, frozen = split_bank(model)                                 bank: lora_a, lora_b and scale of all stacks
    values = adapters.bank.slot_values(model, read_adapter(folder))            NumPy; or an error that names the reason
    bank = write_slot(bank, slot, values)                                      in place: the old bank is donated
    bank = clear_slot(bank, slot)                                              the slot is the bare base again
    nnx.merge(graphdef, bank, frozen)(tokens, adapter_ids=ids)                 also hidden, decode, and those of T5

`adapter_ids` is int32 `[rows]`; None takes the bare base for all rows, and reads no slot. Rows may come in any order.

The product. A and B of each row are gathered, and multiplied as a batch of small matrices; for one token a row, where
reading A and B is all the work, they are multiplied and summed by one fused loop that reads them out of the bank without a
copy between, and on CPUs row by row. Operations and bytes grow with the tokens and with the rows' adapters, not with K
(docs/tenants.md). This is what the compilers say for it: A lies transposed, since TPUs pad a last axis of r to 128; layers
stay in their stack while decoding (`quant.SlotMatrices`); and the bank has the dtype of the activations, since XLA for TPUs
otherwise converts all slots before it gathers some. The result is the same, because float32 matrices are rounded to that
dtype anyway. Training needs float32, and takes few slots at a time.
`jax.lax.ragged_dot` over rows in the order of their slots is not used: for H100 it reads the whole bank
(scripts/benchmarks/measure_bank.py; docs/tenants.md has the figures).

The gradient of a whole bank is as large as the bank. Training therefore takes the adapters of a micro-batch's rows out of
the bank (`take_rows`), and differentiates those (`train.tenants`).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.errors import CheckpointError, OptionError, UnsupportedError, list_names
from qlora_jax.nn import AdapterConstant, LayerContext, Linear, checkpoint_name
from qlora_jax.peft.lora import LoRA
from qlora_jax.peft.method import EMBEDDING_KEYS, Method
from qlora_jax.peft.targets import ALL_LINEAR, choose
from qlora_jax.quant import IndexedSlots, RowMatrices, SlotMatrices, by_platform, einsum

Slots = SlotMatrices | IndexedSlots | RowMatrices

__all__ = [
    "Bank",
    "BankLinear",
    "SlotScale",
    "bank_update",
    "check_held",
    "clear_slot",
    "fill_slot",
    "split_bank",
    "take_rows",
    "write_slot",
]


class SlotScale(AdapterConstant):
    """The scalings of the slots of a bank, 0 for a slot without an adapter of this layer."""


@dataclasses.dataclass(frozen=True)
class Bank(Method):
    """The adapters of many tenants; models take it in place of a method of fine-tuning.

    Attributes:
        slots: K, the number of slots, with slot 0 for the bare base.
        bank_rank: r, the largest rank of an adapter.
        dtype: of the matrices; that of the activations to serve, float32 to train.
        target_modules: the linear modules that adapters may target, as LoRA's field of this name selects them. A stack of
            which one layer is selected is in the bank as a whole.

    Raises:
        OptionError: fewer than 2 slots, or a rank below 1.
    """

    name: ClassVar = "bank"
    title: ClassVar = "A bank of adapters"
    summary: ClassVar = "an adapter of its own for each row"
    peft_type: ClassVar = "LORA"
    suffixes: ClassVar = ("lora_A.weight", "lora_B.weight")

    slots: int = 2
    bank_rank: int = 16
    dtype: DTypeLike = "float32"
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        for name, least in (("slots", 2), ("bank_rank", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"Bank {name}: expected at least {least}, found {getattr(self, name)}")

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, BankSpec]":
        """See `method.Method`."""
        chosen = choose(LoRA(target_modules=self.target_modules), layers)
        spec = BankSpec(self.slots, self.bank_rank, self.dtype)
        return {key: spec for key, names in layers.items() if not chosen.isdisjoint(names)}

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raise UnsupportedError: a bank is no single adapter."""
        raise _no_single_adapter()

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """Raise UnsupportedError: a bank is no single adapter."""
        raise _no_single_adapter()

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "Bank":
        """Raise UnsupportedError: a bank is no single adapter."""
        raise _no_single_adapter()


def _no_single_adapter() -> UnsupportedError:
    return UnsupportedError("a bank of adapters: expected one adapter, which can be merged and saved, found many")


@dataclasses.dataclass(frozen=True)
class BankSpec:
    """The slots of a linear layer: how many, and of which rank and dtype."""

    slots: int
    rank: int
    dtype: DTypeLike = "float32"

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "BankLinear":
        """Return empty slots for one layer."""
        return BankLinear(in_features, out_features, spec=self)


class BankLinear(nnx.Module):
    """The slots of one linear layer.

    Attributes:
        lora_a, lora_b: `nnx.LoRAParam`s holding `quant.SlotMatrices` `[K, r, in]` and `[K, r, out]`.
        scale: float32 `SlotScale` `[K]`.
    """

    def __init__(self, in_features: int, out_features: int, *, spec: BankSpec) -> None:
        self.lora_a = nnx.LoRAParam(SlotMatrices(jnp.zeros((spec.slots, spec.rank, in_features), spec.dtype)))
        self.lora_b = nnx.LoRAParam(SlotMatrices(jnp.zeros((spec.slots, spec.rank, out_features), spec.dtype)))
        self.scale = SlotScale(jnp.zeros((spec.slots,), jnp.float32))

    def __call__(self, x: Array, linear: Linear, context: LayerContext) -> Array:
        y = linear.base(x)
        if context.adapter_ids is None:
            return y
        return y + bank_update(x, self.lora_a.get_value(), self.lora_b.get_value(), self.scale[...], context.adapter_ids)


def bank_update(x: Array, a: Slots, b: Slots, scale: Array, ids: Array) -> Array:
    """Return scale[id] (x A[id]) B[id] for the slot `id` of each row, `[rows, …, out]` in the dtype of x.

    Args:
        x: `[rows, …, in]`.
        a, b: `[K, r, in]` and `[K, r, out]`, or those of the rows.
        scale: float32 `[K]`.
        ids: int32 `[rows]`.
    """
    rows, own_scale = x.reshape(x.shape[0], -1, x.shape[-1]), scale.at[ids].get(mode="clip")
    if rows.shape[1] == 1:
        exact = rows.astype(jnp.float32)
        y = by_platform(exact, a, b, own_scale, ids, cpu=_row_by_row, default=_by_sums).astype(x.dtype)
    else:
        own_a, own_b = a.of_rows(ids), b.of_rows(ids)
        inner = checkpoint_name(einsum("nti,nri->ntr", rows, own_a.astype(x.dtype)), "lora")
        y = einsum("ntr,nro->nto", inner * own_scale[:, None, None].astype(x.dtype), own_b.astype(x.dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _by_sums(x: Array, a: Slots, b: Slots, scale: Array, ids: Array) -> Array:
    """Return scale (x A') B for x `[rows, 1, in]` and scales `[rows]` as one fused loop over the gathered matrices."""
    inner = (x * a.of_rows(ids)).sum(2) * scale[:, None]
    return (inner[..., None] * b.of_rows(ids)).sum(1)


def _row_by_row(x: Array, a: Slots, b: Slots, scale: Array, ids: Array) -> Array:
    """Return the same by a loop over the rows, each of which takes a slice of the bank into the processor's cache.

    XLA for CPUs would gather the matrices of all rows into memory, and read them there again; and in the fused loop it would
    sum over A once for each few features of B.
    """

    def product(row: tuple[Array, Array, Array]) -> Array:
        x, scale, id = row
        inner = (x @ a.of_row(id).astype(x.dtype).T) * scale
        return (inner @ b.of_row(id).astype(x.dtype))[0]

    return jax.lax.map(product, (x, scale, ids))


def split_bank(model: Any) -> tuple[Any, Any, Any]:
    """Return (graphdef, bank, frozen) of a model that was made with a `Bank`; bank holds every stack's slots.

    Each leaf of the bank has the layers as its first axis and the slots as its second.
    """
    graphdef, bank, frozen = nnx.split(model, nnx.Any(nnx.LoRAParam, SlotScale), ...)
    return graphdef, bank, frozen


def take_rows(adapter: Any, scale: Any, ids: Array, dtype: DTypeLike) -> tuple[Any, Any]:
    """Return (adapter, scale) of the rows alone, in place of those of all slots: `[layers, rows, …]`.

    The model then takes the ids 0, 1, 2, … and computes what it would with all slots and these ids.

    Args:
        adapter, scale: A and B, and the scalings, of all slots, as `train.tenants.split_tenants` splits them.
        ids: int32 `[rows]`, the slot of each row.
        dtype: of the matrices; that of the activations, to which they are rounded anyway.
    """

    def of_rows(leaf: Array) -> Array:
        return leaf.at[:, ids].get(mode="clip")

    def rounded(slots: SlotMatrices) -> RowMatrices:
        # XLA would convert all slots before it takes some.
        return RowMatrices(jax.lax.optimization_barrier(of_rows(slots.values)).astype(dtype))

    matrices = jax.tree.map(rounded, adapter, is_leaf=lambda leaf: isinstance(leaf, SlotMatrices))
    return matrices, jax.tree.map(of_rows, scale)


@partial(jax.jit, donate_argnums=0)
def write_slot(bank: Any, slot: int | Array, values: Any) -> Any:
    """Return the bank with an adapter in a slot. The old bank is donated, so that the slot is written in place.

    One program serves all slots and adapters. Slot 0 must stay the bare base.

    Args:
        bank: of `split_bank`.
        slot: the index, which is not checked here.
        values: of `fill_slot`.
    """
    return jax.tree.map(lambda leaf, new: leaf.at[:, slot].set(new.astype(leaf.dtype)), bank, values)


@partial(jax.jit, donate_argnums=0)
def clear_slot(bank: Any, slot: int | Array) -> Any:
    """Return the bank with zeros in a slot, which is then the bare base; see `write_slot`."""
    return jax.tree.map(lambda leaf: leaf.at[:, slot].set(0), bank)


def check_held(name: str, method: Method, rank: int) -> None:
    """Raise UnsupportedError if a bank cannot hold an adapter of this method, with every reason.

    Args:
        name: of the adapter, for the message.
        method: of the adapter.
        rank: that of the bank.
    """
    if reasons := list(_reasons(method, rank)):
        raise UnsupportedError(f"{name}: a bank of adapters cannot hold {'; nor '.join(reasons)}")


def _reasons(method: Method, rank: int) -> Iterator[str]:
    if method.is_full:
        yield "a model whose own parameters are trained"
    if method.virtual_tokens:
        yield f"virtual tokens ({method.peft_type}), which make rows longer"
    elif not isinstance(method, LoRA):
        if not method.is_full:
            yield f"the method {type(method).__name__}: expected LoRA"
        return
    if not isinstance(method, LoRA):
        return
    if method.use_dora:
        yield "DoRA's magnitudes (use_dora), which scale the base's own output"
    if method.changes_base:
        yield f"init_lora_weights {method.init_lora_weights}, whose base is another one than that of the other adapters"
    if method.modules_to_save:
        yield f"whole parameters (modules_to_save {', '.join(method.modules_to_save)})"
    if method.trainable_tokens():
        yield "rows of the token embedding (trainable_token_indices, special tokens)"
    if method.bias != "none" or method.lora_bias:
        yield "biases (bias, lora_bias)"
    if method.layer_replication:
        yield "another order of layers (layer_replication)"
    largest = max(method.rank, *(r for _, r in method.rank_pattern)) if method.rank_pattern else method.rank
    if largest > rank:
        yield f"rank {largest}: its own is {rank}"


def fill_slot(
    bank: Any,
    stacks: Mapping[str, Sequence[str]],
    method: LoRA,
    tensors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    name: str = "adapter",
) -> Any:
    """Return the values of one slot, float32 arrays without the axis of the slots, for `write_slot`.

    Args:
        bank: of `split_bank`; its leaves may be shapes.
        stacks: the full names of the modules, by layer, for the dotted path of each stack (`models.linear_modules`).
        method: gives the scaling of each module.
        tensors: (A `[r, in]`, B `[r, out]`) by the full names of the modules.
        name: of the adapter, for messages.

    Raises:
        CheckpointError: a module that the bank does not have, or matrices of other shapes.
    """
    values = jax.tree.map(lambda leaf: np.zeros((leaf.shape[0], *leaf.shape[2:]), np.float32), bank)
    flat: dict[tuple[Any, ...], np.ndarray] = {path: jax.tree.leaves(leaf)[0] for path, leaf in nnx.to_flat_state(values)}
    places = {module: (key, layer) for key, names in stacks.items() for layer, module in enumerate(names)}
    problems: list[str] = []
    for module, (a, b) in tensors.items():
        key, layer = places.get(module, ("", 0))
        owner = (*key.split("."), "adapter")
        into_a, into_b = flat.get((*owner, "lora_a")), flat.get((*owner, "lora_b"))
        if into_a is None or into_b is None:
            where = "the token embedding or head" if module.rsplit(".")[-1] in EMBEDDING_KEYS else "no place of the bank"
            problems.append(f"{module}: {where}")
            continue
        expected, rank, most = (into_a.shape[2], into_b.shape[2]), a.shape[0], into_a.shape[1]
        if (a.shape[1], b.shape[1]) != expected or b.shape[0] != rank or rank > most:
            problems.append(f"{module}: expected {expected[0]} to {expected[1]}, r <= {most}; found {a.shape}, {b.shape}")
            continue
        into_a[layer, :rank], into_b[layer, :rank] = a, b
        flat[*owner, "scale"][layer] = method.scaling_of(module)
        if not (np.isfinite(a).all() and np.isfinite(b).all() and math.isfinite(method.scaling_of(module))):
            problems.append(f"{module}: expected finite values")
    if problems:
        raise CheckpointError(f"{name}: this adapter does not fit the bank's base: {list_names(problems)}")
    return values
