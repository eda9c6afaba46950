"""The counts of scripts/benchmarks/matmul_kernels.py, on shapes and programs whose bytes are known."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.quant import quantize
from scripts.benchmarks import matmul_kernels as script

HLO = """
fused { %p = f32[8]{0} parameter(0) }
ENTRY %main (codes: u8[4,2048,1024]) -> bf16[8,1024] {
  %codes = u8[4,2048,1024]{2,1,0} parameter(0)
  %cut = u8[1,2048,1024]{2,1,0} fusion(%codes), kind=kLoop
  %small = f32[1,1024]{1,0} broadcast(%cut)
  ROOT %y = bf16[8,1024]{1,0} custom-call(%cut, %small), custom_call_target="tpu_custom_call"
}
"""


def test_a_copy_in_front_of_the_kernel_is_counted() -> None:
    cut, small = 2048 * 1024, 4 * 1024
    assert script.other_bytes(HLO) == (4 * cut + cut) + (cut + small)
    assert script.packed_copies(HLO) == 1
    assert script.packed_copies(HLO.replace("%cut = u8[1,2048,1024]{2,1,0} fusion(", "%cut = u8[8,64]{1,0} fusion(")) == 0


@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (4096, 1024), (8192, 28672), (28672, 8192)])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_decoding_reads_at_most_a_tenth_more_than_the_packed_bytes(shape: tuple[int, int], platform: Any) -> None:
    stack = jax.eval_shape(quantize, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
    inputs, outputs = shape
    weights = script.kernel_bytes(stack, 1, False, platform) - 2 * (inputs + outputs)
    assert weights <= 1.1 * stack.nbytes / 2


def test_matrices_of_a_model() -> None:
    expected = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
    assert script.matrices("llama-3-8b") == expected
    assert list(script.matrices("llama-7b")) == ["q, k, v, o", "gate, up", "down"]


def test_no_rows_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["matmul_kernels.py", "--rows", "8", "0"])
    assert script.main() == 1
    assert capsys.readouterr().err == "error: --rows: expected numbers from 1 on, found 8 0\n"
