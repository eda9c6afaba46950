"""Along which axis frozen leaves are spread."""

import pytest

from qlora_jax.nn import split_axis


@pytest.mark.parametrize(
    ("shape", "devices", "axis"),
    [
        ((32, 2048, 14336), 4, 1),  # codes of a stack: rows
        ((30, 9, 576), 4, 2),  # scales whose rows do not divide: columns
        ((30, 9, 577), 4, None),
        ((32, 4096), 4, 1),  # a norm of each layer; never by layers
        ((128256, 4096), 4, 1),
        ((4096,), 4, None),
        ((), 4, None),
        ((32, 2048, 14336), 1, 1),
    ],
)
def test_rows_then_columns_never_layers(shape: tuple[int, ...], devices: int, axis: int | None) -> None:
    assert split_axis(shape, devices) == axis
