"""Schedules against transformers' formulas, written out; AdamW and clipping against torch's own, step by step.

Lion is written out in NumPy, and Adafactor is that of transformers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.train import SCHEDULES, Schedule, adamw, learning_rate_schedule, optimizer

PEAK = 2e-4
# transformers, for s updates done before, W of warm-up and N in all, after the warm-up:
#   constant_with_warmup   1
#   linear                 (N - s) / (N - W)
#   cosine                 (1 + cos(pi (s - W) / (N - W))) / 2
AFTER: dict[Schedule, Callable[[int, int, int], float]] = {
    "constant": lambda s, w, n: 1.0,
    "linear": lambda s, w, n: (n - s) / (n - w),
    "cosine": lambda s, w, n: (1 + math.cos(math.pi * (s - w) / (n - w))) / 2,
}


@pytest.mark.parametrize("warmup", [0, 1, 10, 49])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules(kind: Schedule, warmup: int) -> None:
    """During the warm-up theirs is s / W, which wastes the first step on a rate of 0; ours is (s + 1) / (W + 1)."""
    steps = 50
    schedule: Any = learning_rate_schedule(kind, PEAK, steps, warmup)
    found = [float(schedule(step)) for step in range(steps)]
    rise = [(step + 1) / (warmup + 1) for step in range(warmup)]
    fall = [AFTER[kind](step, warmup, steps) for step in range(warmup, steps)]
    np.testing.assert_allclose(found, PEAK * np.array(rise + fall), rtol=1e-5, atol=1e-11)
    assert found[0] > 0
    assert max(found) == pytest.approx(PEAK)
    last = float(jax.jit(schedule)(steps - 1))
    np.testing.assert_allclose(last, found[-1], atol=1e-6 * PEAK, err_msg="traced, as the step calls it")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_against_transformers(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=5, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    schedule: Any = learning_rate_schedule(kind, PEAK, 20, 5)  # type: ignore[arg-type]
    np.testing.assert_allclose([float(schedule(s)) for s in range(5, 20)], expected[5:], rtol=1e-5, atol=1e-11)


def test_a_warm_up_as_long_as_the_run() -> None:
    schedule: Any = learning_rate_schedule("cosine", 1.0, 4, 4)
    found = [float(schedule(step)) for step in range(4)]
    np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_that_does_not_fit(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warm-up: expected between 0 and the 10 steps of the run, found {warmup}"):
        learning_rate_schedule("linear", PEAK, 10, warmup)


def test_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'step'; expected one of constant, linear, cosine"):
        learning_rate_schedule("step", PEAK, 10)  # type: ignore[arg-type]


def gradients(step: int) -> dict[str, np.ndarray]:
    """Some small, some large enough to be clipped."""
    draws = np.random.default_rng(step)
    scale = 10.0 ** draws.uniform(-3, 1)
    return {"a": scale * draws.standard_normal((5, 3)), "b": scale * draws.standard_normal(4)}


def updated(tx: Any, steps: int, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)

    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = jax.jit(tx.init)(params)
    for number in range(steps):
        gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients(number))
        params, state = step(params, state, gradient)
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_against_torch(decay: float, clip: float | None) -> None:
    """Twenty updates under a falling rate; torch computes in float64."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    start = gradients(100)
    schedule: Any = learning_rate_schedule("linear", 1e-2, 20)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.8, 0.99), weight_decay=decay)
    for step in range(20):
        for name, value in gradients(step).items():
            parameters[name].grad = torch.from_numpy(value)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.param_groups[0]["lr"] = float(schedule(step))
        optimizer.step()
    found = updated(adamw(schedule, beta1=0.8, beta2=0.99, weight_decay=decay, max_grad_norm=clip), 20, start)
    for name, parameter in parameters.items():
        moved = np.abs(parameter.detach().numpy() - start[name]).max()
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), atol=1e-4 * moved + 1e-6)


def test_clipping_is_by_the_norm_of_all_leaves_together() -> None:
    """Adam's first moment after one update is (1 - beta1) times the gradient that it saw."""
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # of norm 5
    for clip, factor in ((1.0, 1 / 5), (10.0, 1.0), (None, 1.0)):
        tx = adamw(1e-3, max_grad_norm=clip)
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        np.testing.assert_allclose(moments[0], 0.1 * factor * gradient["a"], rtol=1e-6)
        np.testing.assert_allclose(moments[1], 0.1 * factor * gradient["b"], rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_lion(clip: float | None) -> None:
    """Chen et al. 2023, algorithm 2, with decoupled weight decay, under a falling rate."""
    start = gradients(100)
    schedule: Any = learning_rate_schedule("linear", 1e-2, 20)
    expected, moments = {name: x.copy() for name, x in start.items()}, {name: 0 * x for name, x in start.items()}
    for step in range(20):
        gradient = gradients(step)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        for name, g in gradient.items():
            g = g if clip is None else g * min(1.0, clip / norm)
            direction = np.sign(0.9 * moments[name] + 0.1 * g)
            expected[name] -= float(schedule(step)) * (direction + 0.1 * expected[name])
            moments[name] = 0.99 * moments[name] + 0.01 * g
    found = updated(optimizer("lion", schedule, weight_decay=0.1, max_grad_norm=clip), 20, start)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_adafactor_against_transformers(clip: float | None) -> None:
    """Absolute learning rates without scaling by the parameter, as its trainer uses it.

    Matrices are factored and clipped each by itself, though ours are stacked.
    """
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    optimization = pytest.importorskip("transformers.optimization")

    def draw(step: int) -> dict[str, np.ndarray]:
        draws = np.random.default_rng(step)
        scales = 10.0 ** draws.uniform(-3, 0, (4, 1, 1))  # of each layer another
        return {"layers": scales * draws.standard_normal((4, 6, 3)), "vector": draws.standard_normal(5)}

    start = draw(100)
    matrices = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in start["layers"]]
    vector = torch.nn.Parameter(torch.from_numpy(start["vector"].copy()))
    theirs = optimization.Adafactor(
        [*matrices, vector], lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.1
    )
    schedule: Any = learning_rate_schedule("linear", 1e-2, 20)
    tx = optimizer("adafactor", schedule, weight_decay=0.1, max_grad_norm=clip)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step in range(20):
        for matrix, gradient in zip(matrices, draw(step)["layers"], strict=True):
            matrix.grad = torch.from_numpy(gradient.copy())
        vector.grad = torch.from_numpy(draw(step)["vector"])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([*matrices, vector], clip)
        theirs.param_groups[0]["lr"] = float(schedule(step))
        theirs.step()
        updates, state = update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw(step)), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["layers"], np.stack([m.detach().numpy() for m in matrices]), atol=1e-5)
    np.testing.assert_allclose(params["vector"], vector.detach().numpy(), atol=1e-5)


def test_the_state_of_each_optimizer() -> None:
    """Bytes for a stacked adapter of rank 16."""
    shapes = {"a": (30, 576, 16), "b": (30, 16, 576)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    each = 30 * 576 * 16
    rest = 1000  # counters, and a placeholder of one number for each matrix where Optax has no use for a moment
    for name, expected in (("adamw", 8), ("adamw8bit", 2.1), ("lion", 4), ("adafactor", 4 * (1 / 16 + 1 / 576))):
        state = jax.eval_shape(optimizer(name, 1e-3).init, params)
        found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert 0.95 * expected * 2 * each < found < expected * 2 * each + rest, name


def test_what_is_no_optimizer() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; expected one of adamw, adamw8bit, lion, adafactor"):
        optimizer("sgd", 1e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"beta1, beta2: expected none with adafactor, found 0\.9, None"):
        optimizer("adafactor", 1e-3, beta1=0.9)
