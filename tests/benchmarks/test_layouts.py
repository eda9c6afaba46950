"""The layouts of scripts/benchmarks/layouts.py against nibbles packed by NumPy, one byte at a time."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.plan.hlo import parse_program
from scripts.benchmarks import layouts as script

ROWS, COLUMNS = script.UNIT, 6
# By layout: (row, column) of the matrix whose code lies in nibble i, from the highest on, of the stored element [j, n].
HALF, SHARD = ROWS // 2, ROWS // script.SHARDS
PLACES = {
    "rows j, j+32 of a block of 64": lambda j, n, i: (j // 32 * 64 + j % 32 + 32 * i, n),
    "row halves j, j+in/2 (the package's)": lambda j, n, i: (j + HALF * i, n),
    "row halves of each of 4 shards": lambda j, n, i: (j // (SHARD // 2) * SHARD + j % (SHARD // 2) + SHARD // 2 * i, n),
    "columns n, n+out/2": lambda j, n, i: (j, n + COLUMNS // 2 * i),
    "neighbours in rows": lambda j, n, i: (2 * j + i, n),
    "row eighths in 32-bit words": lambda j, n, i: (j + ROWS // 8 * (7 - i), n),
    "XLA's uint4": lambda j, n, i: (j, n),
}
HLO = """
fused (a: u8[8,128]) -> f32[16,128] {
  %a = u8[8,128]{1,0} parameter(0)
  %high = u8[8,128]{1,0} shift-right-logical(%a, %a)
  %both = u8[16,128]{1,0} concatenate(%high, %a), dimensions={0}
  ROOT %made = f32[16,128]{1,0} convert(%both)
}

ENTRY main (a: u8[8,128]) -> f32[16,128] {
  %a = u8[8,128]{1,0} parameter(0)
  ROOT %f = f32[16,128]{1,0} fusion(%a), kind=kLoop, calls=%fused
}
"""


@pytest.mark.parametrize("layout", script.LAYOUTS, ids=lambda layout: layout.name)
def test_packs_as_numpy_does_and_gives_the_codes_back(layout: script.Layout) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (ROWS, COLUMNS), dtype=np.uint8)
    stored = layout.pack(jnp.asarray(codes))
    found = np.asarray(stored.astype(jnp.uint32))
    nibbles = codes.size // found.size
    expected = np.zeros(found.shape, np.uint32)
    for j, n in np.ndindex(*found.shape):
        for i in range(nibbles):
            expected[j, n] = expected[j, n] << 4 | codes[PLACES[layout.name](j, n, i)]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(layout.unpack(stored), codes)
    np.testing.assert_array_equal(layout.unpack_blocks(stored), codes.reshape(-1, script.BLOCK, COLUMNS))


@pytest.mark.parametrize("form", ["matrix", "blocks"])
def test_a_layout_that_mixes_codes_up_is_not_equal(form: script.Form) -> None:
    ours = script.LAYOUTS[1]
    assert script.is_equal(ours, form)
    wrong = script.Layout("wrong", ours.pack, lambda packed: jnp.concatenate([packed & 15, packed >> 4]))
    assert not script.is_equal(wrong, form)


def test_work_is_counted_inside_fusions() -> None:
    assert script.work(parse_program(HLO)) == (8 * 128 + 16 * 128, 16 * 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "v5x"], "unknown device 'v5x'"),
        (["--device", "v5e:2x2"], "--device: expected one of"),
        (["--shape", "100", "128"], "--shape: expected in a multiple of 512"),
        (["--rows", "0"], "--rows: expected one or more numbers of at least 1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["layouts.py", *arguments])
    assert script.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1
