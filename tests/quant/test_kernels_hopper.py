"""The fused product for Hopper GPUs: in Mosaic GPU's interpret mode against float64 products, and through NVIDIA's compiler.

The integration tests take about 20 CPU seconds, the others one.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
from qlora_jax.quant import QuantizedTensor, StackedTensor, dequantize, kernels, matmul, quantize, targets
from qlora_jax.quant.kernels import hopper, trial
from qlora_jax.quant.kernels.trial import Verdict
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


def printing(verdict: Verdict, after: str = "") -> list[str]:
    """Return the command of a process that prints a verdict as that of a trial does."""
    text = json.dumps(dataclasses.asdict(verdict))
    return [sys.executable, "-c", f"import os; print({text!r}, flush=True); {after}"]


@pytest.mark.parametrize(("factor", "reason"), [(1.0, ""), (1.1, "its relative error is 1.0e-01")])
def test_a_trial_compares_with_numpy(monkeypatch: pytest.MonkeyPatch, factor: float, reason: str) -> None:
    def product(x: jax.Array, w: QuantizedTensor, layer: jax.Array, rows: int) -> jax.Array:
        return (x @ dequantize(StackedTensor(w, layer).matrix(), x.dtype) * factor).astype(x.dtype)

    monkeypatch.setattr(hopper, "matmul", product)
    monkeypatch.setattr(trial, "largest_error", lambda: trial.error_of("fp4", 128, False))
    verdict = trial.verdict()
    assert verdict.reason.startswith(reason)
    assert bool(verdict.reason) == bool(reason)
    assert verdict.final
    assert trial.attempt(printing(verdict)) == verdict


def test_a_trial_does_not_overlook_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "error_of", lambda data_type, rows, transposed: np.nan if transposed else 1e-3)
    assert trial.verdict().reason.startswith("its relative error is nan")


def test_an_error_of_cuda_is_final_and_want_of_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: str) -> Any:
        return lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError(message))

    address = "INTERNAL: CUDA error: Failed to end graph capture: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"
    monkeypatch.setattr(trial, "largest_error", fails(f"{address}\nmore"))
    verdict = trial.verdict()
    assert verdict == Verdict(f"it ends with an error of CUDA: {address}", True)
    # What CUDA makes of the end of such a process does not change its verdict; a right product does not excuse a crash.
    assert trial.attempt(printing(verdict, "os.abort()")) == verdict
    right = Verdict("", True)
    assert trial.attempt(printing(right)) == right
    assert trial.attempt(printing(right, "os.abort()")) == Verdict("the trial ended with code -6: no message", True)
    for message in ("RESOURCE_EXHAUSTED: CUDA", "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY", "INVALID_ARGUMENT: a bug"):
        monkeypatch.setattr(trial, "largest_error", fails(message))
        with pytest.raises(jax.errors.JaxRuntimeError):
            trial.verdict()


def test_a_trial_that_fails_or_does_not_end_is_a_reason() -> None:
    code = "import sys; sys.exit('no such instruction')"
    assert trial.attempt([sys.executable, "-c", code]) == Verdict("the trial ended with code 1: no such instruction", False)
    assert trial.attempt([sys.executable, "-c", "while True: pass"], 0.1) == Verdict(
        "the trial did not end within 0.1 s", True
    )
    for printed in ("hello", "0.1", "{}", "[1]"):
        assert trial.attempt([sys.executable, "-c", f"print('{printed}')"]) == Verdict(
            f"the trial printed '{printed}\\n': expected its verdict", False
        )
    verdict = trial.attempt(["/no/such/python"])
    assert verdict.reason.startswith("the trial could not be started: ")
    assert not verdict.final


def test_a_trial_leaves_the_memory_of_the_waiting_process_alone_and_never_takes_the_cpu() -> None:
    code = "import os; assert os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] == 'false'; print(os.environ['JAX_PLATFORMS'])"
    assert trial.attempt([sys.executable, "-c", code]).reason == "the trial printed 'cuda\\n': expected its verdict"


def test_the_result_of_a_trial_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path))
    results = iter([Verdict("", True), Verdict("no memory", False), Verdict("it is wrong", True)])
    monkeypatch.setattr(trial, "attempt", lambda _: next(results))
    is_right = trial._is_right.__wrapped__  # without the cache of this process
    assert is_right("NVIDIA H200")
    assert is_right("NVIDIA H200")  # from the file
    assert capsys.readouterr().err.count("Trying the fused product") == 1
    for reason in ("no memory", "it is wrong", "it is wrong"):
        with pytest.warns(UserWarning, match=f"XLA multiplies: {reason}"):
            assert not is_right("NVIDIA H20")


def test_a_process_has_one_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("QLORA_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict[int, Any]().__getitem__)  # a user without a home folder
    trials: list[Any] = []

    def attempt(command: Any) -> Verdict:
        time.sleep(0.05)
        trials.append(command)
        return Verdict("", not trials)  # of which nothing could be kept

    monkeypatch.setattr(trial, "attempt", attempt)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: trial.is_right("a device of this test"), range(4)))
    assert len(trials) == 1
    assert "QLORA_JAX_CACHE would name a folder to keep the result in" in capsys.readouterr().err


def test_what_the_compiler_rejects_is_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    def rejected(x: jax.Array, w: QuantizedTensor, layer: jax.Array | None = None) -> jax.Array:
        raise RuntimeError("ptxas: no such instruction\nand more")

    for module in (kernels, targets):
        monkeypatch.setattr(module, "has_hopper", lambda: True)
    monkeypatch.setattr(hopper, "matmul", rejected)
    monkeypatch.setattr(kernels, "on_one_device", lambda: True)
    w, x = matrix(256, 128), jax.ShapeDtypeStruct((100, 256), jnp.bfloat16)
    monkeypatch.setattr(trial, "is_right", lambda kind: True)
    message = r"fused product with .* ptxas: no such instruction \(QLORA_JAX_FUSED=0 does without it\)"
    with pytest.warns(UserWarning, match=message):
        assert kernels.fused(x, w) is None  # type: ignore[arg-type]
    assert kernels.fused(x, w) is None  # type: ignore[arg-type]  # without another warning


def test_the_trial_can_be_made_before_a_program_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    for module in (kernels, targets):
        monkeypatch.setattr(module, "has_hopper", lambda: True)
    monkeypatch.setattr(kernels, "on_one_device", lambda: True)
    monkeypatch.setattr(trial, "is_right", lambda kind: tried.append(kind) or True)
    dtype = jnp.dtype(jnp.bfloat16)
    for w in (matrix(256, 128), dataclasses.replace(matrix(576, 128), dtype=dtype)):  # float32, and a width it does not take
        kernels.try_fused({"dense": jnp.ones(3), "packed": w})
    assert not tried
    kernels.try_fused({"dense": jnp.ones(3), "packed": dataclasses.replace(matrix(256, 128), dtype=dtype)})
    assert tried == [jax.devices()[0].device_kind]


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
