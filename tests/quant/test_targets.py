"""Which forms of a computation are traced, and which one a program holds, by what it computes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.quant import by_platform, tracing_for
from qlora_jax.quant.targets import Target


def program() -> tuple[Callable[[jax.Array], jax.Array], list[str]]:
    """Return a jitted choice among three forms, and the list of those that were traced."""
    traced: list[str] = []

    def form(name: str, constant: float) -> Callable[[jax.Array], jax.Array]:
        def compute(x: jax.Array) -> jax.Array:
            traced.append(name)
            return x + constant

        return compute

    forms = {"cpu": form("cpu", 1.0), "tpu": form("tpu", 2.0)}
    return jax.jit(lambda x: by_platform(x, default=form("default", 3.0), **forms)), traced


def test_where_the_cpu_is_alone_its_form_alone_is_traced() -> None:
    run, traced = program()
    assert run(jnp.zeros(())) == 1
    assert traced == ["cpu"]


@pytest.mark.parametrize(("target", "form", "value"), [("tpu", "tpu", 2), ("cuda", "default", 3), ("cpu", "cpu", 1)])
def test_one_platform(target: Target, form: str, value: float) -> None:
    """The same function again in another context is traced anew."""
    run, traced = program()
    run(jnp.zeros(()))
    with tracing_for(target):
        assert run(jnp.zeros(())) == value
    assert traced[-1] == form
    assert run(jnp.zeros(())) == 1


def test_every_platform() -> None:
    """As in a process with other devices: the program is the right one wherever it is compiled."""
    run, traced = program()
    with tracing_for("every"):
        assert run(jnp.zeros(())) == 1
        lowered = jax.jit(run).trace(jnp.zeros(())).lower(lowering_platforms=("cuda",)).as_text()
    assert set(traced) == {"cpu", "tpu", "default"}
    assert "3.000000e+00" in lowered
