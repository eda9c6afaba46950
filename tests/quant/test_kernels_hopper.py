"""The fused product for Hopper GPUs: in Mosaic GPU's interpret mode against float64 products, and through NVIDIA's compiler.

The integration tests take about 20 CPU seconds, the others one.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_checks import LIMITS, dense_matrix, random, relative_error

from qlora_jax.plan import machine_mesh, machine_named
from qlora_jax.plan.compile import compile_program, place
from qlora_jax.plan.topology import context
from qlora_jax.quant import QuantizedTensor, StackedTensor, dequantize, kernels, matmul, quantize
from qlora_jax.quant.kernels import hopper, trial
from qlora_jax.quant.targets import tracing_for

HOPPER, AMPERE = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def on(kind: str, count: int = 1) -> Any:
    """The context of a program for GPUs that need not be there."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((count,), ("x",), abstract_device=device))


def matrix(*shape: int, block_size: int = 64) -> QuantizedTensor:
    return jax.eval_shape(lambda w: quantize(w, "nf4", block_size), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype", "reason"),
    [
        ((1152, 256), 64, "bfloat16", None),
        ((60, 6656, 17920), 256, "bfloat16", None),
        ((100, 128), 64, "bfloat16", "the flat layout"),
        ((256, 128), 32, "bfloat16", "blocks of 32: expected a multiple of 64"),
        ((576, 128), 64, "bfloat16", "a matrix [576, 128]: expected multiples of 128 and 128"),
        ((256, 128), 64, "float32", "x in float32: expected bfloat16"),
    ],
)
def test_what_the_kernel_takes(shape: Any, block_size: int, dtype: str, reason: str | None) -> None:
    assert hopper.unsupported_reason(matrix(*shape, block_size=block_size), dtype) == reason


@pytest.mark.parametrize(("count", "rows"), [(65, 128), (200, 256), (256, 256), (300, 128), (512, 256), (1100, 256)])
def test_a_tile_has_rows_without_much_padding(count: int, rows: int) -> None:
    assert hopper.rows_of_tile(count) == rows


def test_the_fused_product_is_for_hopper_gpus_and_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = matrix(256, 128), jax.ShapeDtypeStruct((2048, 256), jnp.bfloat16)
    more = jax.ShapeDtypeStruct((2049, 256), jnp.bfloat16)
    assert kernels.fused(x, w) is None  # type: ignore[arg-type]
    with on(AMPERE):
        assert kernels.fused(x, w) is None  # type: ignore[arg-type]
    with on(HOPPER, 4):  # XLA cannot partition the kernel
        assert kernels.fused(x, w) is None  # type: ignore[arg-type]
    with on(HOPPER):
        assert kernels.fused(x, w) is not None  # type: ignore[arg-type]
        assert kernels.fused(more, w) is None  # type: ignore[arg-type]
        assert kernels.fused(x, matrix(576, 128)) is None  # type: ignore[arg-type]
        monkeypatch.setenv("QLORA_JAX_FUSED", "0")
        assert kernels.fused(x, w) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("factor", "reason"), [(1.0, ""), (1.1, "its relative error is 1.0e-01")])
def test_a_trial_compares_with_numpy(monkeypatch: pytest.MonkeyPatch, factor: float, reason: str) -> None:
    def product(x: jax.Array, w: QuantizedTensor, layer: jax.Array, rows: int) -> jax.Array:
        return (x @ dequantize(StackedTensor(w, layer).matrix(), x.dtype) * factor).astype(x.dtype)

    monkeypatch.setattr(hopper, "matmul", product)
    error = trial.error_of("fp4", 128, False)
    found, final = trial.attempt([sys.executable, "-c", f"print({error})"])
    assert found.startswith(reason)
    assert final
    assert (error <= trial.LARGEST_ERROR) == (not reason)


def test_a_trial_does_not_overlook_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "error_of", lambda data_type, rows, transposed: np.nan if transposed else 1e-3)
    error = trial.largest_error()
    assert np.isnan(error)
    assert trial.attempt([sys.executable, "-c", f"print('{error}')"])[0].startswith("its relative error is nan")


def test_a_trial_that_fails_or_does_not_end_is_a_reason() -> None:
    code = "import sys; sys.exit('no such instruction')"
    assert trial.attempt([sys.executable, "-c", code]) == ("the trial ended with code 1: no such instruction", False)
    assert trial.attempt([sys.executable, "-c", "while True: pass"], 0.1) == ("the trial did not end within 0.1 s", True)
    assert trial.attempt([sys.executable, "-c", "import os; os.abort()"]) == (
        "the trial ended with code -6: no message",
        True,
    )
    assert trial.attempt([sys.executable, "-c", "print('hello')"])[0].startswith("the trial printed 'hello")
    reason, final = trial.attempt(["/no/such/python"])
    assert reason.startswith("the trial could not be started: ")
    assert not final


def test_a_trial_leaves_the_memory_of_the_waiting_process_alone_and_never_takes_the_cpu() -> None:
    code = "import os; assert os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] == 'false'; print(os.environ['JAX_PLATFORMS'])"
    assert trial.attempt([sys.executable, "-c", code])[0] == "the trial printed 'cuda\\n': expected its error"


def test_the_result_of_a_trial_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path))
    results = iter([("", True), ("no memory", False), ("it is wrong", True)])
    monkeypatch.setattr(trial, "attempt", lambda _: next(results))
    is_right = trial.is_right.__wrapped__  # without the cache of this process
    assert is_right("NVIDIA H200")
    assert is_right("NVIDIA H200")  # from the file
    assert capsys.readouterr().err.count("Trying the fused product") == 1
    for reason in ("no memory", "it is wrong", "it is wrong"):
        with pytest.warns(UserWarning, match=f"XLA multiplies: {reason}"):
            assert not is_right("NVIDIA H20")


# 384 rows are three packed tiles, as many as are loaded ahead; 100 and 500 rows of x are padded to 128 and to two tiles.
@pytest.mark.integration
@pytest.mark.parametrize(
    ("shape", "data_type", "block_size", "double", "count", "transposed"),
    [((384, 128), "nf4", 64, True, 100, False), ((256, 256), "fp4", 128, False, 500, True)],
)
def test_interpreted_products(
    shape: Any, data_type: Any, block_size: int, double: bool, count: int, transposed: bool
) -> None:
    q, layer = quantize(random(2, *shape), data_type, block_size, double), jnp.int32(1)
    x = jnp.asarray(random(count, shape[transposed], seed=1), jnp.bfloat16)
    product = hopper.matmul_transposed if transposed else hopper.matmul
    y = jax.jit(lambda x, q, layer: product(x, q, layer, interpret=interpret_parameters()))(x, q, layer)
    dense = dense_matrix(jax.tree.map(lambda leaf: leaf[1], q))
    expected = np.asarray(x, np.float64) @ (dense.T if transposed else dense)
    assert (y.dtype, y.shape) == (jnp.bfloat16, expected.shape)
    assert relative_error(y, expected) < LIMITS["bfloat16"]
    assert not races_found()


def interpret_parameters() -> Any:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from JAX 0.12 on

    return InterpretGPUParams(detect_races=True)


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.get_races().races_found)


@pytest.mark.integration
@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's CUDA plugin is not installed",
)
def test_a_program_for_an_h100_holds_no_dense_matrix() -> None:
    machine = machine_named("h100")
    mesh = machine_mesh(machine)
    shapes = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16), matrix(3, 1024, 2048), jax.ShapeDtypeStruct((), jnp.int32)

    def with_gradient(x: jax.Array, q: QuantizedTensor, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull_back = jax.vjp(lambda x: matmul(x, StackedTensor(q, layer)), x)
        return y, pull_back(y)[0]

    with context(mesh), tracing_for("every"):
        program = compile_program(jax.jit(with_gradient), place(shapes, mesh, P()), machine)
    assert program.text.count('custom_call_target="mosaic_gpu_v2"') == 2
    assert program.flops == 2 * 2 * 512 * 1024 * 2048
    packed, activations = 1024 * 2048 // 2, 2 * 512 * (1024 + 2048)
    scales = 1024 * 2048 // 64 * (1 + 3 * 4)  # 8-bit codes; float32, written once and read twice
    assert program.traffic < 1.02 * (2 * packed + 2 * activations + scales)
    assert program.temporaries < packed
