"""Trains 64 tenants together on a tiny Llama, in two orders of joining, and each of them alone; compares the adapters.

    python tests/train/many_tenants.py --tenants 64 --steps 50

Ranks, scalings, targets, rates, schedules, warm-ups, decays, clips, betas, steps, rows and objectives (SFT, and DPO for
every fourth tenant) are mixed. The reference is a run of its own: the loss and gradient of one LoRA, and Optax' own rule and
schedule. Tenants join at the start, or one after another in the opposite order with waits between. The largest difference
relative to the norm of a tensor is printed, and has to be at most 1e-5.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import optax
from flax import nnx
from test_tenants import Tenant, base, own_model, spec, values_of

from qlora_jax.peft import LoRA
from qlora_jax.peft.bank import Bank
from qlora_jax.train import OptimizerSpec, language_model_loss, learning_rate_schedule
from qlora_jax.train.dpo import dpo_loss
from qlora_jax.train.tenant_slots import get_slot, init_tenants, new_slot, put_slot, slot_settings, split_tenants
from qlora_jax.train.tenants import tenant_programs

RANK, ROWS = 4, 8
LIMIT = 1e-5
METHODS = (
    LoRA(rank=4, alpha=8.0),
    LoRA(rank=1, alpha=4.0),
    LoRA(rank=2, alpha=2.0, use_rslora=True),
    LoRA(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj")),
)


def is_dpo(number: int) -> bool:
    return number % 4 == 3


def tenant(number: int, steps: int) -> Tenant:
    optimizer = OptimizerSpec(
        weight_decay=(0.0, 0.5, 0.1)[number % 3],
        max_grad_norm=(0.3, 1.0, None, 0.05)[number // 3 % 4],
        beta2=(None, 0.95)[number // 5 % 2],
        loraplus_lr_ratio=(None, None, 4.0)[number // 7 % 3],
    )
    schedule: Any = ("constant", "linear", "cosine")[number // 2 % 3]
    own_steps, peak = steps - number % 7, (1e-3, 3e-3, 1e-2)[number // 4 % 3]
    method = METHODS[number // 8 % len(METHODS)]
    return Tenant(method, optimizer, schedule, peak, own_steps, number % 3, 1 + number % 2, number)


def batch_of(number: int, chosen: Tenant, step: int) -> dict[str, np.ndarray]:
    if not is_dpo(number):
        return chosen.batch(step)
    sides = (chosen.batch(2 * step + 1000), chosen.batch(2 * step + 1001))
    both = zip(("chosen", "rejected"), sides, strict=True)
    return {f"{side}_{name}": array for side, batch in both for name, array in batch.items()}


def units(batch: dict[str, np.ndarray]) -> float:
    """What the loss is divided by; 1 where a batch has no learned token, as in a run."""
    return max(float(batch["loss_mask"].sum()), 1.0) if "loss_mask" in batch else float(len(batch["chosen_inputs"]))


@cache
def gradient_of(method: LoRA, dpo: bool, graph: Any) -> Any:
    loss = dpo_loss if dpo else language_model_loss

    def summed(adapter: Any, frozen: Any, batch: Any) -> Any:
        found: Any = loss(nnx.merge(graph, adapter, frozen), batch, None)
        return found[0] if dpo else found

    return jax.jit(jax.grad(summed))


def alone(number: int, chosen: Tenant) -> Any:
    """The values of a tenant's slot after its own run."""
    graph, adapter, frozen = own_model(chosen)
    schedule = learning_rate_schedule(chosen.schedule, chosen.peak, chosen.steps, chosen.warmup)
    tx: Any = chosen.optimizer.build(schedule)

    @jax.jit
    def change(adapter: Any, state: Any, gradient: Any, total: Any) -> Any:
        updates, state = tx.update(jax.tree.map(lambda leaf: leaf / total, gradient), state, adapter)
        return optax.apply_updates(adapter, updates), state

    state = tx.init(adapter)
    for step in range(chosen.steps):
        batch = batch_of(number, chosen, step)
        gradient = gradient_of(chosen.method, is_dpo(number), graph)(adapter, frozen, batch)
        adapter, state = change(adapter, state, gradient, np.float32(units(batch)))
    return values_of(chosen, nnx.merge(graph, adapter, frozen))[0]


@cache
def bank(slots: int) -> tuple[Any, Any, Any]:
    described = spec(Bank(slots + 1, RANK))
    graph, *_ = split_tenants(described.abstract("cpu"))
    adapter, scale, _ = jax.jit(lambda: split_tenants(described.build(nnx.Rngs(0)))[1:])()
    return tenant_programs(graph), adapter, scale


def together(tenants: list[Tenant], joins: list[int], slots_of: list[int], frozen: Any) -> list[Any]:
    """The values of each tenant's slot after its last step; tenant i joins its slot before step joins[i]."""
    programs, adapter, scale = bank(len(tenants))
    state = jax.jit(init_tenants)(adapter, scale)
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    done: list[Any] = [None] * len(tenants)
    for now in range(max(join + one.steps for join, one in zip(joins, tenants, strict=True))):
        slots, shares = np.full(len(tenants), len(tenants) + 1, np.int32), {False: [], True: []}
        for number, (chosen, join) in enumerate(zip(tenants, joins, strict=True)):
            if now == join:
                graph, own, constants = own_model(chosen)
                settings = slot_settings(chosen.optimizer, chosen.schedule, chosen.peak, chosen.steps, chosen.warmup)
                matrices, scales = values_of(chosen, nnx.merge(graph, own, constants))
                state = put_slot(state, slots_of[number], new_slot(matrices, scales, settings))
            if join <= now < join + chosen.steps:
                slots[number] = slots_of[number]
                shares[is_dpo(number)].append((number, batch_of(number, chosen, now - join)))
        sums = programs.begin(state, slots)
        for dpo, rows in shares.items():
            for batch in micro_batches(rows, dpo):
                sums = programs.accumulate["dpo" if dpo else "sft"](slots, state, sums, frozen, batch)
        state, _ = programs.update(state, slots, sums)
        for number, (chosen, join) in enumerate(zip(tenants, joins, strict=True)):
            if now == join + chosen.steps - 1:
                done[number] = jax.tree.map(np.asarray, get_slot(state, slots_of[number]).adapter)
    return done


def micro_batches(rows: list[tuple[int, dict[str, np.ndarray]]], dpo: bool) -> list[dict[str, np.ndarray]]:
    if not rows:
        return []
    arrays = {name: np.concatenate([batch[name] for _, batch in rows]) for name in rows[0][1]}
    counts = [len(next(iter(batch.values()))) for _, batch in rows]
    arrays["adapter_ids"] = np.repeat(np.asarray([number for number, _ in rows], np.int32), counts)
    arrays["share"] = np.repeat(np.asarray([1 / units(batch) for _, batch in rows], np.float32), counts)
    if dpo:
        arrays |= {"beta": np.full(sum(counts), 0.1, np.float32), "label_smoothing": np.zeros(sum(counts), np.float32)}
    more = -sum(counts) % ROWS
    padded = {name: np.pad(array, ((0, more), *((0, 0),) * (array.ndim - 1))) for name, array in arrays.items()}
    padded["adapter_ids"][sum(counts) :] = rows[-1][0]
    return [{n: x[start : start + ROWS] for n, x in padded.items()} for start in range(0, len(padded["share"]), ROWS)]


def largest_difference(count: int, steps: int) -> float:
    """Print and return the largest difference of a tensor of any tenant, in either order, relative to its norm."""
    tenants = [tenant(number, steps) for number in range(count)]
    frozen = base()[3]  # that of every tenant's own model too
    expected = [alone(number, chosen) for number, chosen in enumerate(tenants)]
    orders = {
        "all at once": ([0] * count, list(range(1, count + 1))),
        "one after another, the other way round": (
            [(count - number) // 2 for number in range(count)],
            list(range(count, 0, -1)),
        ),
    }
    worst = 0.0
    for words, (joins, slots_of) in orders.items():
        found, most = together(tenants, joins, slots_of, frozen), 0.0
        for own, other in zip(found, expected, strict=True):
            for one, reference in zip(*map(jax.tree.leaves, (own, other)), strict=True):
                size = float(np.linalg.norm(reference))
                most = max(most, float(np.linalg.norm(one - reference)) / size if size else float(np.abs(one).max()))
        print(f"{count} tenants, {steps} steps, {words}: largest difference {most:.1e}", flush=True)
        worst = max(worst, most)
    programs = bank(count)[0]
    print(f"programs compiled: {programs.cache_sizes()}", flush=True)
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    chosen_sizes = parser.parse_args()
    sys.exit(largest_difference(chosen_sizes.tenants, chosen_sizes.steps) > LIMIT)
