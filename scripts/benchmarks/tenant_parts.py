"""The parts of a step of tenants on this machine, in CPU seconds, each as a program of its own (measure_tenants.py)."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.models import ModelSpec, family_of
from qlora_jax.peft import LoRA
from qlora_jax.peft.bank import Bank, bank_update
from qlora_jax.plan import SIZES
from qlora_jax.quant import Quantization, RowMatrices, dequantize, quantize
from qlora_jax.train import OptimizerSpec, create_state, jit_train_step, language_model_loss, learning_rate_schedule, split
from qlora_jax.train.cross_entropy import chunked_cross_entropy
from qlora_jax.train.tenant_slots import init_tenants, split_tenants
from qlora_jax.train.tenants import tenant_programs

__all__ = ["step_parts"]

RANK, REPEATS = 16, 3
HF = SIZES["smollm2-135m"]


def step_parts(tenants: int, length: int) -> dict[str, Any]:
    """Print and return the CPU seconds of the parts of a step of one tenant with one row, and of all tenants together."""
    config = family_of(HF).config(HF)
    draws = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, rows in (("alone", 1), ("together", tenants)):
        tokens, whole = rows * length, _whole(config, draws, rows, length, alone=name == "alone")
        parts = {
            "products with the base": _base_products(tokens),
            "dequantisation": _dequantisation(),
            "head and loss": _head(draws, tokens),
            "products of the adapters": _adapters(rows, length),
            **({"update": whole["update"]} if "update" in whole else {}),
        }
        gflop = _gflop(tokens)
        rate = _rate(tokens)
        found[name] = {"step": whole["step"], **parts, "gflop": gflop, "gflop_per_cpu_second": rate, "floor": gflop / rate}
        rest = whole["step"] - sum(parts.values())
        print(
            f"{name}: a step of {rows} x {length}: {whole['step']:.2f} CPU s; "
            + "; ".join(f"{part} {seconds:.2f}" for part, seconds in {**parts, "everything else": rest}.items())
        )
        print(f"  floor: {gflop:.0f} GFLOP of products at {rate:.0f} GFLOP a CPU second: {gflop / rate:.2f} s", flush=True)
    ratio = found["together"]["floor"] / (tenants * found["alone"]["step"])
    found["least_ratio"] = ratio
    print(f"least that any step together can take, of {tenants} steps alone: {ratio:.2f}")
    return found


def _cpu(function: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call, after one to compile."""
    jax.block_until_ready(function())
    start = time.process_time()
    for _ in range(REPEATS):
        jax.block_until_ready(function())
    return (time.process_time() - start) / REPEATS


def _matrices() -> list[tuple[int, int]]:
    hidden, middle, heads = HF["hidden_size"], HF["intermediate_size"], HF["num_key_value_heads"] / HF["num_attention_heads"]
    keys = int(hidden * heads)
    return [
        (hidden, hidden),
        (hidden, keys),
        (hidden, keys),
        (hidden, hidden),
        (hidden, middle),
        (hidden, middle),
        (middle, hidden),
    ]


def _gflop(tokens: int) -> float:
    """Return the GFLOP of a step's products: base and head forward and backward, attention, and the adapters' six."""
    base = sum(rows * columns for rows, columns in _matrices()) * HF["num_hidden_layers"]
    adapters = sum(RANK * (rows + columns) for rows, columns in _matrices()) * HF["num_hidden_layers"]
    head = HF["vocab_size"] * HF["hidden_size"]
    return 2 * tokens * (2 * base + 2 * head + 3 * adapters) / 1e9


def _rate(tokens: int) -> float:
    """Return the GFLOP a CPU second of a product of two float32 matrices."""
    rows, columns = HF["hidden_size"], HF["intermediate_size"]
    x, w = jnp.ones((tokens, rows)), jnp.ones((rows, columns))
    product = jax.jit(jnp.dot)
    many = max(1, 20_000 // tokens)

    def run() -> Array:
        return [product(x, w) for _ in range(many)][-1]

    return 2 * tokens * rows * columns * many / _cpu(run) / 1e9


def _base_products(tokens: int) -> float:
    """Return the time of all products with dense matrices of the base, forward and the gradient of x."""
    total = 0.0
    for rows, columns in _matrices():
        x, w = jnp.ones((tokens, rows)), jnp.ones((rows, columns))
        total += _cpu(lambda x=x, w=w: _both(x, w))
    return total * HF["num_hidden_layers"]


@jax.jit
def _both(x: Array, w: Array) -> tuple[Array, Array]:
    y = x @ w
    return y, y @ w.T


def _dequantisation() -> float:
    """Return the time to dequantise every matrix twice, for forward and backward."""
    total = 0.0
    for rows, columns in set(_matrices()):
        packed = jax.jit(quantize)(jnp.ones((rows, columns)))
        dense = jax.jit(lambda packed: dequantize(packed, jnp.float32))
        total += _cpu(lambda packed=packed, dense=dense: dense(packed)) * _matrices().count((rows, columns))
    return 2 * total * HF["num_hidden_layers"]


def _head(draws: np.random.Generator, tokens: int) -> float:
    head = jnp.ones((HF["vocab_size"], HF["hidden_size"]))
    hidden = jnp.ones((tokens, HF["hidden_size"]))
    targets = jnp.asarray(draws.integers(0, HF["vocab_size"], tokens, np.int32))
    loss = jax.jit(jax.value_and_grad(chunked_cross_entropy))
    return _cpu(lambda: loss(hidden, head, targets, jnp.ones(tokens)))


def _adapters(rows: int, length: int) -> float:
    """Return the time of the products of the adapters, forward and backward, as a bank computes them."""
    ids, total = jnp.arange(rows, dtype=jnp.int32), 0.0

    @jax.jit
    def both(x: Array, a: Array, b: Array) -> Any:
        def update(x: Array, a: Array, b: Array) -> Array:
            return bank_update(x, RowMatrices(a), RowMatrices(b), jnp.ones(rows), ids)

        y, pull_back = jax.vjp(update, x, a, b)
        return y, pull_back(y)

    for into, out in set(_matrices()):
        x, a, b = jnp.ones((rows, length, into)), jnp.ones((rows, RANK, into)), jnp.ones((rows, RANK, out))
        total += _cpu(lambda x=x, a=a, b=b: both(x, a, b)) * _matrices().count((into, out))
    return total * HF["num_hidden_layers"]


def _whole(config: Any, draws: np.random.Generator, rows: int, length: int, *, alone: bool) -> dict[str, float]:
    """Return the time of the whole step, and of its update where that is a program of its own."""
    batch: dict[str, Any] = {
        name: draws.integers(0, config.vocab_size, (rows, length), np.int32) for name in ("inputs", "targets")
    }
    batch |= {"loss_mask": np.ones((rows, length), np.float32), "segment_ids": np.ones((rows, length), np.int32)}
    batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    method: Any = LoRA(rank=RANK) if alone else Bank(rows + 1, RANK)
    spec = ModelSpec(config, Quantization(), method=method, dtype="float32", remat="dots")
    if alone:
        graph, *_ = split(spec.abstract("cpu"))
        adapter, frozen = jax.jit(lambda: split(spec.build(nnx.Rngs(0)))[1:])()
        tx = OptimizerSpec().build(learning_rate_schedule("constant", 1e-4, 100))
        state = create_state(tx, adapter)
        step, held = jit_train_step(graph, tx, language_model_loss, state), [state]
        stacked = {name: array[None] for name, array in batch.items()}

        def one() -> Any:
            held[0], metrics = step(held[0], frozen, stacked)
            return metrics

        return {"step": _cpu(one)}
    graph, *_ = split_tenants(spec.abstract("cpu"))
    adapter, scale, frozen = jax.jit(lambda: split_tenants(spec.build(nnx.Rngs(0)))[1:])()
    programs, slots = tenant_programs(graph), np.arange(1, rows + 1, dtype=np.int32)
    many = [jax.jit(init_tenants)(adapter, scale)]
    batch |= {"adapter_ids": np.arange(rows, dtype=np.int32), "share": np.full(rows, 1 / length, np.float32)}

    def sums() -> Any:
        return programs.accumulate["sft"](slots, many[0], programs.begin(many[0], slots), frozen, batch)

    ready = sums()

    def change() -> Any:
        many[0], metrics = programs.update(many[0], slots, ready)
        return metrics

    update = _cpu(change)
    return {"step": _cpu(sums) + update, "update": update}
