"""Many tenants trained at once against a run of each alone, on the tiny Llama; what one tenant's NaN and coming and going do
to the others. About 15 CPU-seconds in the integration tier.

The reference is the step of one adapter (`train.step`) with Optax' own rules and schedules.
"""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_config import CONFIG

from qlora_jax.adapters.bank import slot_values
from qlora_jax.adapters.bind import adapter_tensors
from qlora_jax.adapters.files import Adapter
from qlora_jax.errors import OptionError
from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.peft.bank import Bank, SlotScale
from qlora_jax.quant import Quantization
from qlora_jax.train import (
    OptimizerSpec,
    create_state,
    jit_train_step,
    language_model_loss,
    learning_rate_schedule,
    split,
)
from qlora_jax.train.optim import Schedule
from qlora_jax.train.tenant_slots import (
    TenantsState,
    get_slot,
    init_tenants,
    new_slot,
    put_slot,
    slot_settings,
    slot_to_host,
    split_tenants,
)
from qlora_jax.train.tenants import tenant_programs

RANK, SLOTS, ROWS, LENGTH = 4, 9, 6, 16


@dataclasses.dataclass(frozen=True)
class Tenant:
    """A tenant of the test: its adapter, optimizer, schedule and data."""

    method: LoRA = LoRA(rank=4, alpha=8.0)
    optimizer: OptimizerSpec = dataclasses.field(default_factory=OptimizerSpec)
    schedule: Schedule = "constant"
    peak: float = 1e-2
    steps: int = 5
    warmup: int = 0
    rows: int = 1
    seed: int = 0

    def batch(self, step: int) -> dict[str, np.ndarray]:
        draws = np.random.default_rng([self.seed, step])
        shape = (self.rows, LENGTH)
        batch = {name: draws.integers(0, CONFIG["vocab_size"], shape, np.int32) for name in ("inputs", "targets")}
        batch["loss_mask"] = (draws.random(shape) < 0.3 + 0.1 * (self.seed % 5)).astype(np.float32)
        return batch


TENANTS = (
    Tenant(),
    Tenant(LoRA(rank=1, alpha=4.0), OptimizerSpec(weight_decay=0.5), "linear", 3e-2, seed=1),
    Tenant(LoRA(rank=2, alpha=2.0, use_rslora=True), OptimizerSpec(max_grad_norm=None), "cosine", warmup=2, rows=3, seed=2),
    Tenant(LoRA(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj")), OptimizerSpec(max_grad_norm=0.01), seed=3),
    Tenant(LoRA(rank=4, alpha=1.0), OptimizerSpec(beta1=0.8, beta2=0.95), "cosine", 5e-3, steps=3, rows=2, seed=4),
    Tenant(LoRA(rank=2, alpha=4.0, target_modules=r".*1\.mlp\.up_proj"), OptimizerSpec(loraplus_lr_ratio=4.0), seed=5),
    Tenant(LoRA(rank=3, alpha=3.0, rank_pattern=(("0.self_attn.q_proj", 1),)), schedule="linear", warmup=1, steps=4, seed=6),
    Tenant(LoRA(rank=1, alpha=1.0), OptimizerSpec(weight_decay=0.1, max_grad_norm=1.0), rows=2, seed=7),
)


def spec(method: Any) -> ModelSpec:
    return ModelSpec(
        llama_config(CONFIG | {"model_type": "llama"}), Quantization(), method=method, dtype="float32", remat="dots"
    )


@cache
def base() -> tuple[Any, Any, Any, Any]:
    """(graphdef, adapter, scale, frozen) of the bank's model, whose frozen values are those of every tenant's own."""
    described = spec(Bank(SLOTS, RANK))
    graph, *_ = split_tenants(described.abstract("cpu"))
    return graph, *jax.jit(lambda: split_tenants(described.build(nnx.Rngs(0)))[1:])()


@cache
def programs() -> Any:
    return tenant_programs(base()[0])


@cache
def own_model(tenant: Tenant) -> tuple[Any, Any, Any]:
    """(graphdef, adapter, frozen) of a tenant alone, over the same base; A and B are random."""
    described = spec(tenant.method)
    graph, _, _ = split(described.abstract("cpu"))
    adapter, constants = jax.jit(lambda: split(described.build(nnx.Rngs(tenant.seed)))[1:])()
    draws = np.random.default_rng(tenant.seed)
    noise = jax.tree.map(lambda leaf: leaf + 0.1 * draws.standard_normal(leaf.shape, np.float32), adapter)
    shared = dict(nnx.to_flat_state(base()[3]))
    frozen = nnx.from_flat_state([(path, shared.get(path, leaf)) for path, leaf in nnx.to_flat_state(constants)])
    return graph, noise, frozen


def values_of(tenant: Tenant, model: Any) -> Any:
    """The values of a slot, (adapter, scale), of a tenant's own model."""
    values = slot_values(spec(Bank(SLOTS, RANK)).abstract("cpu"), Adapter("t", tenant.method, None, adapter_tensors(model)))
    return tuple(nnx.split_state(values, nnx.LoRAParam, SlotScale))


@cache
def alone(tenant: Tenant) -> Any:
    """The values of a tenant's slot after its own run."""
    graph, adapter, frozen = own_model(tenant)
    schedule = learning_rate_schedule(tenant.schedule, tenant.peak, tenant.steps, tenant.warmup)
    tx = tenant.optimizer.build(schedule)
    state = create_state(tx, jax.tree.map(jnp.array, adapter))
    step = jit_train_step(graph, tx, language_model_loss, state)
    for index in range(tenant.steps):
        state, _ = step(state, frozen, jax.tree.map(lambda x: x[None], tenant.batch(index)))
    return values_of(tenant, nnx.merge(graph, state.adapter, frozen))[0]


@cache
def first(tenant: Tenant) -> TenantsState:
    graph, adapter, frozen = own_model(tenant)
    settings = slot_settings(tenant.optimizer, tenant.schedule, tenant.peak, tenant.steps, tenant.warmup)
    matrices, scale = values_of(tenant, nnx.merge(graph, adapter, frozen))
    return new_slot(matrices, scale, settings)


def micro_batches(rows: list[tuple[int, dict[str, np.ndarray]]]) -> list[dict[str, np.ndarray]]:
    """The rows of tenants, each with its place among the slots, in micro-batches of ROWS; the last one is padded."""
    total = {place: max(batch["loss_mask"].sum(), 1.0) for place, batch in rows}
    arrays = {name: np.concatenate([batch[name] for _, batch in rows]) for name in rows[0][1]}
    arrays["adapter_ids"] = np.concatenate([np.full(len(batch["inputs"]), place, np.int32) for place, batch in rows])
    arrays["share"] = np.concatenate([np.full(len(b["inputs"]), 1 / total[p], np.float32) for p, b in rows])
    more = -len(arrays["share"]) % ROWS
    padded = {n: np.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))) for n, x in arrays.items() if n != "adapter_ids"}
    padded["adapter_ids"] = np.pad(arrays["adapter_ids"], (0, more), mode="edge")
    return [{n: x[start : start + ROWS] for n, x in padded.items()} for start in range(0, len(padded["share"]), ROWS)]


def step(
    state: TenantsState, frozen: Any, at: dict[int, tuple[Tenant, int]], poison: Any = None
) -> tuple[TenantsState, Any]:
    """One step of the tenants in these slots, each at its own step."""
    met = SLOTS - 1
    slots = np.full(met, SLOTS, np.int32)
    slots[: len(at)] = list(at)
    rows = []
    for place, (tenant, index) in enumerate(at.values()):
        batch = tenant.batch(index)
        if tenant is poison:
            batch["loss_mask"] = batch["loss_mask"] * np.float32("nan")
        rows.append((place, batch))
    sums = programs().begin(state, slots)
    for batch in micro_batches(rows):
        sums = programs().accumulate["sft"](slots, state, sums, frozen, batch)
    return programs().update(state, slots, sums)


def empty() -> TenantsState:
    _, adapter, scale, _ = base()
    state = jax.jit(init_tenants)(adapter, scale)
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def train(joins: dict[int, tuple[Tenant, int]], steps: int, poison: Any = None) -> dict[Tenant, TenantsState]:
    """Train tenants, which join a slot after some steps and leave when they are done; return their last states."""
    state, frozen = empty(), base()[3]
    done: dict[Tenant, TenantsState] = {}
    for now in range(steps):
        at = {}
        for slot, (tenant, join) in joins.items():
            if now == join:
                state = put_slot(state, slot, first(tenant))
            if join <= now < join + tenant.steps:
                at[slot] = (tenant, now - join)
        if at:
            state, _ = step(state, frozen, at, poison)
        for slot, (tenant, join) in joins.items():
            if now == join + tenant.steps - 1:
                done[tenant] = jax.tree.map(np.asarray, get_slot(state, slot))
    return done


@pytest.fixture(scope="module")
def together() -> dict[Tenant, TenantsState]:
    return train({slot: (tenant, 0) for slot, tenant in enumerate(TENANTS, start=1)}, 5)


@pytest.mark.integration
def test_eight_tenants_equal_their_own_runs(together: dict[Tenant, TenantsState]) -> None:
    """Ranks, targets, scalings, rates, schedules, warm-ups, decays, betas, clips, LoRA+, rows and lengths of runs differ."""
    for tenant in TENANTS:
        for found, expected, start in zip(
            *map(jax.tree.leaves, (together[tenant].adapter, alone(tenant), first(tenant).adapter)), strict=True
        ):
            # Relative in the norm of each tensor: AdamW divides a single gradient near 0 by its own size, rounding included.
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            if np.abs(expected).max() > 0:
                assert np.abs(expected - start).max() > 1e-4
        assert together[tenant].count == tenant.steps


@pytest.mark.integration
def test_the_order_of_joining_does_not_matter_and_compiles_nothing(together: dict[Tenant, TenantsState]) -> None:
    before = (programs().cache_sizes(), put_slot._cache_size(), get_slot._cache_size())  # pyright: ignore
    joins = {SLOTS - 1 - place: (tenant, (5 * place) % 7) for place, tenant in enumerate(TENANTS)}
    other = train(joins, 12)
    assert (programs().cache_sizes(), put_slot._cache_size(), get_slot._cache_size()) == before  # pyright: ignore
    for tenant in TENANTS:
        for found, expected in zip(*map(jax.tree.leaves, (other[tenant], together[tenant])), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.integration
def test_nan_of_one_tenant_does_not_reach_the_others() -> None:
    """Nor do its rows: the bits of the others are those of a run in which that tenant has no rows."""
    joins = {slot: (tenant, 0) for slot, tenant in enumerate(TENANTS[:5], start=1)}
    poisoned = train(joins, 5, poison=TENANTS[2])
    without = train({slot: pair for slot, pair in joins.items() if pair[0] is not TENANTS[2]}, 5)
    for tenant in without:
        for found, expected in zip(*map(jax.tree.leaves, (poisoned[tenant], without[tenant])), strict=True):
            np.testing.assert_array_equal(found, expected)
    kept = poisoned[TENANTS[2]]
    assert kept.count == 0
    for found, expected in zip(*map(jax.tree.leaves, (kept, first(TENANTS[2]))), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.integration
def test_slots_without_rows_keep_their_bits() -> None:
    state = empty()
    for slot, tenant in enumerate(TENANTS[:3], start=1):
        state = put_slot(state, slot, first(tenant))
    before = [jax.tree.map(np.asarray, get_slot(state, slot)) for slot in (0, 1, 3)]
    state, metrics = step(state, base()[3], {2: (TENANTS[1], 0)})
    for slot, old in zip((0, 1, 3), before, strict=True):
        for found, expected in zip(*map(jax.tree.leaves, (get_slot(state, slot), old)), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert int(get_slot(state, 2).count) == 1
    assert bool(metrics["finite"][0])


@pytest.mark.integration
def test_a_state_keeps_its_bits_on_its_way_through_host_memory() -> None:
    state = put_slot(empty(), 1, first(TENANTS[1]))
    away = slot_to_host(state, 1)
    matrices = jax.tree.leaves((away.adapter, away.mu, away.nu))
    assert {leaf.sharding.memory_kind for leaf in matrices} == {"pinned_host"}
    state = put_slot(state, 3, away)
    for found, expected in zip(*map(jax.tree.leaves, (get_slot(state, 3), first(TENANTS[1]))), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_state_grows_linearly_with_the_slots() -> None:
    def size(slots: int) -> int:
        _, adapter, scale, _ = split_tenants(spec(Bank(slots, RANK)).abstract("cpu"))
        state = jax.eval_shape(init_tenants, adapter, scale)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    sizes = {slots: size(slots) for slots in (2, 9, 65, 513)}
    assert all(size == slots * sizes[2] // 2 for slots, size in sizes.items())


@pytest.mark.parametrize("optimizer", [OptimizerSpec("lion"), OptimizerSpec("adamw", host_optimizer=True)])
def test_other_optimizers_are_refused(optimizer: OptimizerSpec) -> None:
    with pytest.raises(OptionError, match="expected adamw on the device for many tenants"):
        slot_settings(optimizer, "constant", 1e-3, 10, 0)
