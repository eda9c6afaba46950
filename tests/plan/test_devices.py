"""Devices by name, what is said where there is no such one, and what each has to have."""

import importlib.util

import pytest

from qlora_jax.plan import DEVICES, CompilerMissing, check_compiler, machine_named


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [("h100", 1, (1,)), ("h100x4", 4, (4,)), ("rtx4090", 1, (1,)), ("v5e", 1, (1, 1)), ("v5p:2x2x1", 4, (2, 2, 1))],
)
def test_a_name_stands_for_a_machine(name: str, count: int, shape: tuple[int, ...]) -> None:
    machine = machine_named(name)
    assert (machine.count, machine.shape, machine.name) == (count, shape, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", r"unknown device 'h10'; did you mean h100\? known: h100, .*v6e"),
        ("a100", r"did you mean a100-80 or a100-40"),
        ("4090", r"did you mean rtx4090"),
        ("v5e:2", r"expected a topology of 2 sides such as v5e:2x2, found '2'"),
        ("v5p:2x2", r"expected a topology of 3 sides such as v5p:2x2x1"),
        ("v5e:0x2", r"expected a topology"),
        ("v5e:3x7", r"expected sides of 1 or even ones, as Cloud TPU has them, found '3x7'"),
        ("h100:4", r"expected h100 or a number of them such as h100x4"),
        ("h100x0", r"expected h100 or a number"),
    ],
)
def test_what_is_no_device_is_told_with_what_is(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine_named(name)


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_its_figures(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert 15e9 < device.memory_bytes < 200e9
    assert 200e9 < device.bandwidth < 10e12
    assert 50e12 < device.flops < 3e15
    # Operations that have to be done for each byte that is read before the products are the bound.
    assert 70 < device.flops / device.bandwidth < 600
    assert (device.target_config is None) == (device.platform == "tpu") == (device.dimensions > 0)


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match=r'pip install "qlora-jax\[cuda\]"'):
        check_compiler(machine_named("h100"))
    with pytest.raises(CompilerMissing, match=r'pip install "qlora-jax\[tpu\]"'):
        check_compiler(machine_named("v5e"))
