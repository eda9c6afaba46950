"""The real compilers of GPU and TPU, where they are installed, on a small model; one process each."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "compile_small.py"
ROOT = Path(__file__).parents[2]
GPUS = ("h100", "h200", "b200", "a100-80", "a100-40", "l4", "rtx4090", "rtx3090")
PLUGINS = {  # modules, and our extra
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "cuda"),
    "tpu": (("libtpu",), "tpu"),
}
TPUS = ("v4", "v5e", "v5p", "v6e")
SLACK = 2**16  # the batch, counters, and the alignment of each argument


def compiled(platform: str, *flags: str) -> Any:
    modules, extra = PLUGINS[platform]
    if not any(importlib.util.find_spec(name) for name in modules):
        pytest.skip(f'compiling for {platform} needs its plugin: pip install "qlora-jax[{extra}]"')
    done = subprocess.run(
        [sys.executable, str(PROGRAM), platform, *flags],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cuda() -> Any:
    return compiled("cuda")


@pytest.fixture(scope="module")
def tpu() -> Any:
    return compiled("tpu")


@pytest.mark.parametrize(("platform", "devices"), [("cuda", GPUS), ("tpu", TPUS)])
def test_a_product_for_each_device(platform: str, devices: tuple[str, ...]) -> None:
    assert compiled(platform, "--products") == dict.fromkeys(devices, 2 * 128**3)


@pytest.mark.integration
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_loop_over_a_stack_moves_the_stack_once(platform: str, request: pytest.FixtureRequest) -> None:
    """By hand: every matrix is read once; the sum is at most read, transposed and written in each of 16 iterations."""
    traffic, stack, matrix = request.getfixturevalue(platform)["traffic"]
    assert stack <= traffic <= stack + (16 * 4 + 4) * matrix


@pytest.mark.integration
def test_a_plan_for_a_tpu_fits_exactly_if_libtpu_accepts_the_program(tpu: Any) -> None:
    """Two programs on both sides of the limit of 15.75 GiB; the temporaries that libtpu reports would refuse the first."""
    limit, one = 15.75 * 2**30, 4096 * 2  # bytes of a row
    fits, refused = tpu["limit"]
    assert 0.98 * limit < fits["peak"] <= limit
    assert fits["peak"] == pytest.approx((8 + 2 + 2) * 166912 * one + 8 * 4096 * one, rel=0.001)  # stack, temporaries, x, dx
    assert refused["needed"] > limit


def check_arguments(plan: dict[str, Any]) -> None:
    program = plan["program"]
    arguments = plan["packed_weights"] + plan["dense_weights"] + plan["adapter"] + plan["optimizer"]
    assert 0 <= program["arguments"] - arguments <= SLACK
    assert program["aliased"] >= plan["adapter"] + plan["optimizer"]  # the old state is donated
    in_program = program["arguments"] + program["temporaries"] + program["outputs"] - program["aliased"]
    assert plan["peak"] == in_program + program["added_workspace"]
    assert 3 in plan["loops"]  # over the layers


@pytest.mark.integration
def test_a_step_for_gpu(cuda: Any) -> None:
    plan = cuda["train"]
    check_arguments(plan)
    assert plan["optimizer"] == 0
    assert plan["host_optimizer"] == 2 * plan["adapter"] + 3 * 8  # two moments; counters of rule and schedule of each layer
    assert abs(plan["program"]["host_arguments"] - plan["host_optimizer"]) <= SLACK
    assert plan["program"]["workspace"] == 4 * 128 * (64 + 1) * 4  # heads, tokens, features of a head: in the temporaries
    assert plan["program"]["added_workspace"] == 0


@pytest.mark.integration
def test_four_devices_share_the_frozen_weights(cuda: Any) -> None:
    one, four = cuda["train"], cuda["four"]
    check_arguments(four)
    assert four["adapter"] == one["adapter"]
    assert four["packed_weights"] == pytest.approx(one["packed_weights"] / 4, rel=0.01)
    assert four["program"]["added_workspace"] == one["program"]["workspace"]  # on top of the others
    assert four["program"]["flops"] == pytest.approx(one["program"]["flops"], rel=0.01)  # of each device
    assert one["copied_stacks"] == four["copied_stacks"] == 0  # gathered layer by layer where they lie


@pytest.mark.integration
def test_a_decode_step_reads_the_weights_and_the_cache(cuda: Any) -> None:
    plan = cuda["decode"]
    assert plan["cache"] == 2 * 3 * 256 * 2 * 64 * 2
    assert plan["program"]["aliased"] >= plan["cache"]  # it is donated
    least = plan["packed_weights"] + plan["dense_weights"] / 2 + plan["adapter"]  # of the token table one row is read
    assert least < plan["program"]["traffic"] < 3 * least
    assert plan["packed_weights"] <= plan["stack_reads"] <= 1.1 * plan["packed_weights"]  # by the kernel, layer by layer
    assert plan["copied_caches"] == 0


@pytest.mark.integration
def test_what_serving_takes_grows_with_the_slots_and_what_it_does_does_not(cuda: Any) -> None:
    found = cuda["serve"]
    (few, many), (small, large) = found["banks"], found["peaks"]
    assert many / few == pytest.approx(65 / 5)
    assert large - small == pytest.approx(many - few, rel=0.02)
    assert found["cache"] == 2 * 3 * 4 * (256 + 64) * 2 * 64 * 2  # keys and values, layers, rows, tokens, heads, features
    assert found["cache"] + few < found["arguments"] <= small
    assert all(aliased >= found["cache"] for aliased in found["aliased"])  # no program copies the cache
    for name, (traffic, flops) in found["programs"][0].items():
        assert found["programs"][1][name] == pytest.approx([traffic, flops], rel=0.05)


@pytest.mark.integration
def test_the_kernel_of_4_bit_matrices_compiles_for_gpus(cuda: Any) -> None:
    assert cuda["kernels"]
    for read, layer in cuda["kernels"]:
        assert layer <= read <= 1.1 * layer


@pytest.mark.integration
def test_the_fit_is_the_largest(cuda: Any) -> None:
    fit = cuda["fit"]
    (rows, peak), limit = fit["found"], fit["limit"]
    assert peak <= limit
    assert rows + 1 in fit["asked"]  # and it did not fit
    assert len(fit["asked"]) <= 8


@pytest.mark.integration
def test_a_step_for_tpu(tpu: Any) -> None:
    check_arguments(tpu["train"])


@pytest.mark.integration
def test_a_decode_step_for_tpu_reads_everything_once(tpu: Any) -> None:
    """Packed bytes, the head of the two tables, the adapter and the cache: nothing is copied, nothing read twice."""
    plan = tpu["decode"]
    least = plan["packed_weights"] + plan["dense_weights"] / 2 + plan["adapter"] + plan["cache"]
    assert least < plan["program"]["traffic"] < 1.05 * least
    assert plan["copied_caches"] == 0
    assert 0 < plan["stack_reads"] <= plan["packed_weights"]


@pytest.mark.integration
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_few_dense_copies_of_matrices_live_at_once(platform: str, request: pytest.FixtureRequest) -> None:
    plan = request.getfixturevalue(platform)["train"]
    assert plan["dense_matrices"] <= 1


@pytest.mark.integration
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_token_table_is_read_where_it_lies(platform: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(platform)["train"]["copied_tables"] == 0
