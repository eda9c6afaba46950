"""Which forms of a computation are traced, and which one a program holds, by what it computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.quant import by_platform, targets, tracing_for
from qlora_jax.quant.targets import Target


def program() -> tuple[Any, list[str]]:
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


@pytest.mark.parametrize(
    ("platforms", "forms"),
    [(("cpu", "cuda"), {"cpu", "default"}), (("cpu", "tpu"), {"cpu", "tpu"}), (("tpu",), {"tpu"}), (("cuda",), {"default"})],
)
def test_a_process_traces_the_forms_of_its_own_platforms(
    monkeypatch: pytest.MonkeyPatch, platforms: tuple[str, ...], forms: set[str]
) -> None:
    """Whichever of them a program is compiled for, it holds that platform's form."""
    monkeypatch.setattr(targets, "_platforms", lambda: platforms)
    run, traced = program()
    lowered = {name: run.trace(jnp.zeros(())).lower(lowering_platforms=(name,)).as_text() for name in platforms}
    assert set(traced) == forms
    for name, text in lowered.items():
        assert {"cpu": "1.000000e+00", "tpu": "2.000000e+00", "cuda": "3.000000e+00"}[name] in text
        assert text.count("stablehlo.add") == 1
    if "cpu" in platforms:
        assert run(jnp.zeros(())) == 1


def test_forms_that_are_one_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_platforms", lambda: ("cpu", "cuda"))
    traced = []
    jax.make_jaxpr(lambda x: by_platform(x, default=lambda x: traced.append(0) or x, tpu=jnp.sin))(1.0)
    assert traced == [0]
