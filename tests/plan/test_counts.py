"""Operations of traced programs and bytes of compiled ones, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from tiny_llama import TINY

from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.nn import AttentionTarget, causal_attention
from qlora_jax.peft import LoRA
from qlora_jax.plan.flops import count_flops
from qlora_jax.plan.hlo import parse_program
from qlora_jax.quant import quantize
from qlora_jax.train import BatchSpec, StepSpec, build_step, language_model_objective, train_step


def test_products_count_as_often_as_a_scan_runs() -> None:
    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    shapes = (jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32))
    assert count_flops(jax.jit(loop).trace(*shapes).jaxpr) == 5 * 2 * 8 * 16 * 16
    back = jax.jit(jax.grad(lambda x, w: loop(x, w).sum(), argnums=(0, 1))).trace(*shapes)
    assert count_flops(back.jaxpr) == 3 * 5 * 2 * 8 * 16 * 16


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_training_step_is_counted_as_by_hand(micro_batches: int) -> None:
    """Full remat: a layer's products run forward twice and back once, but for the last product of the second forward."""
    rank, tokens, length = 8, 2 * 64, 64
    spec = StepSpec(
        ModelSpec(llama_config(TINY), method=LoRA(rank)),
        language_model_objective(packed=False),
        BatchSpec(batch_size=2, micro_batches=micro_batches, length=length),
    )
    step = build_step(spec, platform="cpu")
    traced = jax.jit(
        lambda state, frozen, batch: train_step(step.graphdef, step.tx, step.objective.loss, state, frozen, batch)
    ).trace(step.state, step.frozen, step.batch)
    shapes = [(256, 256), (256, 128), (256, 128), (256, 256), (256, 512), (256, 512), (512, 256)]
    linear = sum(a * b for a, b in shapes)
    lora = sum(rank * (a + b) for a, b in shapes)
    attention = 4 * 64 * 64 * 64 * 2  # heads, queries, keys, features of a head, rows
    layer = tokens * (3 * linear - 512 * 256)  # forward, again without the last, back to the inputs
    layer += tokens * (4 * lora - 256 * rank)  # back to inputs and to A and B
    layer += attention * (2 + 2 + 5 - 1)  # the product with the values is not made again, its result is not needed
    head = 2 * tokens * 512 * 256  # the logits, and back to the hidden states
    label = 2 * tokens * 256 / 2  # the logit of the target once more, by itself
    counted = count_flops(traced.jaxpr)
    by_hand = 2.0 * micro_batches * (3 * layer + head + label)
    assert counted == pytest.approx(by_hand, rel=0.03)


def test_the_parts_of_packed_rows_are_half_of_all_scores() -> None:
    """Between halves of 512, 256 and 128 tokens, and within leaves of 128, which XLA computes whole."""
    target, length = AttentionTarget("gpu", (9, 0)), 1024
    q, ids = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, length), jnp.int32)

    def attend(q: jax.Array, ids: jax.Array) -> jax.Array:
        return causal_attention(q, q, q, segment_ids=ids, target=target).astype(jnp.float32).sum()

    pairs = 512 * 512 + 2 * 256 * 256 + 4 * 128 * 128 + 8 * 128 * 128
    assert count_flops(jax.jit(attend).trace(q, ids).jaxpr, platform="cuda") == 2 * 2 * 2 * 64 * pairs
    back = jax.jit(jax.grad(attend)).trace(q, ids)
    assert count_flops(back.jaxpr, platform="cuda") == pytest.approx((2 + 5) * 2 * 2 * 64 * pairs, rel=2e-3)  # a padded row


PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_slice (param_0: f32[8,16,16], param_1: s32[]) -> f32[1,16,16] {
  %param_0 = f32[8,16,16]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  ROOT %slice = f32[1,16,16]{2,1,0} dynamic-slice(%param_0, %param_1, %param_1, %param_1), dynamic_slice_sizes={1,16,16}
}

%fused_update (param_0.1: f32[8,16,16], param_1.1: f32[1,16,16], param_2: s32[]) -> f32[8,16,16] {
  %param_0.1 = f32[8,16,16]{2,1,0} parameter(0)
  %param_1.1 = f32[1,16,16]{2,1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %update = f32[8,16,16]{2,1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %param_2, %param_2)
}

%body (carry: (s32[], f32[8,16,16])) -> (s32[], f32[8,16,16]) {
  %carry = (s32[], f32[8,16,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %all = f32[8,16,16]{2,1,0} get-tuple-element(%carry), index=1
  %one = f32[1,16,16]{2,1,0} fusion(%all, %i), kind=kLoop, calls=%fused_slice
  %near = f32[1,16,16]{2,1,0:T(8,128)S(1)} copy(%one)
  %new = f32[8,16,16]{2,1,0} fusion(%all, %near, %i), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], f32[8,16,16]{2,1,0}) tuple(%i, %new)
}

%condition (carry.1: (s32[], f32[8,16,16])) -> pred[] {
  %carry.1 = (s32[], f32[8,16,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: (s32[], f32[8,16,16])) -> (s32[], f32[8,16,16]) {
  %x = (s32[], f32[8,16,16]{2,1,0}) parameter(0)
  ROOT %while = (s32[], f32[8,16,16]{2,1,0}) while(%x), condition=%condition, body=%body
}
"""


def test_bytes_of_a_loop_are_those_of_its_slices_as_often_as_it_runs() -> None:
    program = parse_program(PROGRAM)
    assert [trips for _, trips in program.loops()] == [8]
    matrix, index = 16 * 16 * 4, 4
    # The slice is read and written, read by the copy into the near memory, and written into the whole; two fusions read i.
    assert program.traffic(trips=False) == 4 * matrix + 2 * index
    assert program.traffic() == 8 * (4 * matrix + 2 * index)


def test_what_is_no_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="found no entry"):
        parse_program("HloModule nothing")


def test_a_kernel_of_a_stack_reads_one_layer() -> None:
    program = parse_program(
        "ENTRY %main (a: bf16[1,256], w: u8[22,128,512]) -> bf16[1,512] {\n"
        "  %a = bf16[1,256]{1,0} parameter(0)\n"
        "  %w = u8[22,128,512]{2,1,0} parameter(1)\n"
        '  ROOT %matmul_4bit.1 = bf16[1,512]{1,0} custom-call(%a, %a, %w), custom_call_target="tpu_custom_call"\n'
        "}\n"
    )
    assert program.traffic() == 2 * 512 + 128 * 512 + 1024


def test_the_configuration_of_a_kernel_does_not_end_a_computation() -> None:
    program = parse_program(
        "ENTRY %main (a: f32[64]) -> f32[64] {\n"
        "  %a = f32[64]{0} parameter(0)\n"
        '  %k = f32[64]{0} custom-call(%a), custom_call_target="tpu_custom_call", kernel_metadata={\n'
        "{\n"
        '}}, metadata={op_name="pallas_call"}\n'
        "  ROOT %b = f32[64]{0} negate(%k)\n"
        "}\n"
    )
    assert program.traffic() == 2 * (256 + 256)


def test_what_updates_a_slice_writes_the_slice() -> None:
    program = parse_program(
        "ENTRY %main (a: f32[64,8], b: f32[1,8], i: s32[]) -> f32[64,8] {\n"
        "  %a = f32[64,8]{1,0} parameter(0)\n"
        "  %b = f32[1,8]{1,0} parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  ROOT %d = f32[64,8]{1,0} dynamic-update-slice(%a, %b, %i, %i)\n"
        "}\n"
    )
    assert program.traffic() == 2 * 32 + 2 * 4


@pytest.mark.parametrize(("combined", "expected"), [("%q", 2 * 32 + 4), ("%s", 2 * 2048 + 32 + 4)])
def test_a_scatter_that_combines_nothing_writes_what_it_updates(combined: str, expected: int) -> None:
    """One that adds is counted as it was: it reads and writes all."""
    root = "" if combined == "%q" else "  ROOT %s = f32[] add(%p, %q)\n"
    last = "ROOT " if combined == "%q" else ""
    program = parse_program(
        "%combine (p: f32[], q: f32[]) -> f32[] {\n"
        "  %p = f32[] parameter(0)\n"
        f"  {last}%q = f32[] parameter(1)\n"
        f"{root}"
        "}\n"
        "ENTRY %main (a: f32[64,8], i: s32[1], b: f32[1,8]) -> f32[64,8] {\n"
        "  %a = f32[64,8]{1,0} parameter(0)\n"
        "  %i = s32[1]{0} parameter(1)\n"
        "  %b = f32[1,8]{1,0} parameter(2)\n"
        "  ROOT %d = f32[64,8]{1,0} scatter(%a, %i, %b), update_window_dims={1}, to_apply=%combine\n"
        "}\n"
    )
    assert program.traffic() == expected


def test_a_slice_within_a_fusion_within_a_fusion_is_read_as_one() -> None:
    program = parse_program(
        "%inner (p: f32[8,16], i: s32[]) -> f32[1,16] {\n"
        "  %p = f32[8,16]{1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        "  ROOT %s = f32[1,16]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,16}\n"
        "}\n"
        "%outer (q: f32[8,16], j: s32[]) -> f32[1,16] {\n"
        "  %q = f32[8,16]{1,0} parameter(0)\n"
        "  %j = s32[] parameter(1)\n"
        "  %f = f32[1,16]{1,0} fusion(%q, %j), kind=kLoop, calls=%inner\n"
        "  ROOT %n = f32[1,16]{1,0} negate(%f)\n"
        "}\n"
        "ENTRY %main (x: f32[8,16], k: s32[]) -> f32[1,16] {\n"
        "  %x = f32[8,16]{1,0} parameter(0)\n"
        "  %k = s32[] parameter(1)\n"
        "  ROOT %o = f32[1,16]{1,0} fusion(%x, %k), kind=kLoop, calls=%outer\n"
        "}\n"
    )
    assert program.traffic() == 2 * 64 + 4


def test_a_slice_brought_near_is_read_as_a_slice() -> None:
    program = parse_program(
        "ENTRY %main (x: f32[8,16]) -> f32[2,16] {\n"
        "  %x = f32[8,16]{1,0} parameter(0)\n"
        "  %s = ((f32[8,16]{1,0}), f32[2,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[2:4], [0:16]}\n"
        "  ROOT %d = f32[2,16]{1,0:S(1)} slice-done(%s)\n"
        "}\n"
    )
    assert program.traffic() == 2 * 64


def stack_program(result: str, body: str) -> str:
    """A fusion of a stack `[8, 16, 16]` of 8 KiB and an index, whose body makes `result` of `%p` and `%i`."""
    return (
        "%copies (c: f32[8,16,16]) -> f32[8,16,16] {\n"
        "  %c = f32[8,16,16]{2,1,0} parameter(0)\n"
        "  ROOT %copied = f32[8,16,16]{1,2,0} copy(%c)\n"
        "}\n"
        "%two (t: f32[8,16,16]) -> (f32[8,16,16], f32[8]) {\n"
        "  %t = f32[8,16,16]{2,1,0} parameter(0)\n"
        "  %n = f32[8,16,16]{2,1,0} negate(%t)\n"
        "  %r = f32[8]{0} reduce(%t, %z), dimensions={1,2}, to_apply=%add\n"
        "  ROOT %pair = (f32[8,16,16]{2,1,0}, f32[8]{0}) tuple(%n, %r)\n"
        "}\n"
        f"%outer (p: f32[8,16,16], i: s32[]) -> {result} {{\n"
        "  %p = f32[8,16,16]{2,1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        f"{body}"
        "}\n"
        f"ENTRY %main (x: f32[8,16,16], k: s32[]) -> {result} {{\n"
        "  %x = f32[8,16,16]{2,1,0} parameter(0)\n"
        "  %k = s32[] parameter(1)\n"
        f"  ROOT %o = {result} fusion(%x, %k), kind=kLoop, calls=%outer\n"
        "}\n"
    )


ONE, ALL = 16 * 16 * 4, 8 * 16 * 16 * 4
SLICE = "dynamic_slice_sizes={1,16,16}"


@pytest.mark.parametrize(
    ("result", "body", "expected"),
    [
        pytest.param(
            "f32[1,16,16]",
            "  %f = f32[8,16,16]{1,2,0} fusion(%p), kind=kLoop, calls=%copies\n"
            f"  ROOT %s = f32[1,16,16]{{1,2,0}} dynamic-slice(%f, %i, %i, %i), {SLICE}\n",
            ONE + 4 + ONE,
            id="a copy of the stack in a fusion of its own, sliced later",
        ),
        pytest.param(
            "f32[16,16]",
            "  %f = f32[8,16,16]{1,2,0} fusion(%p), kind=kLoop, calls=%copies\n"
            f"  %s = f32[1,16,16]{{1,2,0}} dynamic-slice(%f, %i, %i, %i), {SLICE}\n"
            "  %b = f32[16,16]{1,0} bitcast(%s)\n"
            "  ROOT %e = f32[16,16]{1,0} exponential(%b)\n",
            ONE + 4 + ONE,
            id="the same with elementwise work behind the slice",
        ),
        pytest.param(
            "f32[1,16,16]",
            "  %n = f32[8,16,16]{2,1,0} negate(%p)\n"
            f"  ROOT %s = f32[1,16,16]{{2,1,0}} dynamic-slice(%n, %i, %i, %i), {SLICE}\n",
            ONE + 4 + ONE,
            id="elementwise work before the slice",
        ),
        pytest.param(
            "f32[1,16,16]",
            "  %f = (f32[8,16,16]{2,1,0}, f32[8]{0}) fusion(%p), kind=kLoop, calls=%two\n"
            "  %g = f32[8,16,16]{2,1,0} get-tuple-element(%f), index=0\n"
            f"  ROOT %s = f32[1,16,16]{{2,1,0}} dynamic-slice(%g, %i, %i, %i), {SLICE}\n",
            ONE + 4 + ONE,
            id="one of two results, sliced",
        ),
        pytest.param(
            "f32[16,16]",
            "  %z = f32[] constant(0)\n  ROOT %r = f32[16,16]{1,0} reduce(%p, %z), dimensions={0}, to_apply=%add\n",
            ALL + ONE,
            id="a sum over the stack reads all of it",
        ),
        pytest.param(
            "f32[8,16,16]",
            "  %q = f32[1,16,16]{2,1,0} broadcast(%i), dimensions={}\n"
            "  %u = f32[8,16,16]{2,1,0} dynamic-update-slice(%p, %q, %i, %i, %i)\n"
            "  ROOT %c = f32[8,16,16]{2,1,0} bitcast(%u)\n",
            4 + ONE,
            id="an update in place writes the slice and reads nothing of the stack",
        ),
        pytest.param(
            "f32[8,16,16]",
            "  %q = f32[1,16,16]{2,1,0} broadcast(%i), dimensions={}\n"
            "  %u = f32[8,16,16]{2,1,0} dynamic-update-slice(%p, %q, %i, %i, %i)\n"
            "  ROOT %c = f32[8,16,16]{2,1,0} negate(%u)\n",
            ALL + 4 + ALL,
            id="an update in the middle does not",
        ),
        pytest.param(
            "f32[16,16]",
            "  %b = f32[128,16]{1,0} bitcast(%p)\n"
            "  ROOT %d = f32[16,16]{1,0} dot(%b, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}\n",
            ALL + ONE,
            id="a product reads all of it",
        ),
    ],
)
def test_a_fusion_reads_what_its_results_need(result: str, body: str, expected: int) -> None:
    assert parse_program(stack_program(result, body)).traffic() == expected


def test_an_update_within_a_fusion_within_a_fusion_writes_the_slice() -> None:
    program = parse_program(
        "%inner (p: f32[8,16], v: f32[1,16], i: s32[]) -> f32[8,16] {\n"
        "  %p = f32[8,16]{1,0} parameter(0)\n"
        "  %v = f32[1,16]{1,0} parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  ROOT %u = f32[8,16]{1,0} dynamic-update-slice(%p, %v, %i, %i)\n"
        "}\n"
        "%outer (q: f32[8,16], w: f32[1,16], j: s32[]) -> f32[8,16] {\n"
        "  %q = f32[8,16]{1,0} parameter(0)\n"
        "  %w = f32[1,16]{1,0} parameter(1)\n"
        "  %j = s32[] parameter(2)\n"
        "  ROOT %f = f32[8,16]{1,0} fusion(%q, %w, %j), kind=kLoop, calls=%inner\n"
        "}\n"
        "ENTRY %main (x: f32[8,16], y: f32[1,16], k: s32[]) -> f32[8,16] {\n"
        "  %x = f32[8,16]{1,0} parameter(0)\n"
        "  %y = f32[1,16]{1,0} parameter(1)\n"
        "  %k = s32[] parameter(2)\n"
        "  ROOT %o = f32[8,16]{1,0} fusion(%x, %y, %k), kind=kLoop, calls=%outer\n"
        "}\n"
    )
    assert program.traffic() == 64 + 4 + 64


def test_a_tuple_of_a_tuple_and_an_array_is_written_whole() -> None:
    """A reduction of two arrays, whose results and another array are those of a fusion."""
    program = parse_program(
        "%most (a: f32[], b: s32[], c: f32[], d: s32[]) -> (f32[], s32[]) {\n"
        "  %a = f32[] parameter(0)\n"
        "  %b = s32[] parameter(1)\n"
        "  %c = f32[] parameter(2)\n"
        "  %d = s32[] parameter(3)\n"
        "  ROOT %t = (f32[], s32[]) tuple(%a, %b)\n"
        "}\n"
        "%body (p: f32[8,16], i: s32[8,16]) -> ((f32[8], s32[8]), f32[8,16]) {\n"
        "  %p = f32[8,16]{1,0} parameter(0)\n"
        "  %i = s32[8,16]{1,0} parameter(1)\n"
        "  %z = f32[] constant(0)\n"
        "  %n = s32[] constant(0)\n"
        "  %r = (f32[8]{0}, s32[8]{0}) reduce(%p, %i, %z, %n), dimensions={1}, to_apply=%most\n"
        "  %e = f32[8,16]{1,0} exponential(%p)\n"
        "  ROOT %o = ((f32[8]{0}, s32[8]{0}), f32[8,16]{1,0}) tuple(%r, %e)\n"
        "}\n"
        "ENTRY %main (x: f32[8,16], y: s32[8,16]) -> ((f32[8], s32[8]), f32[8,16]) {\n"
        "  %x = f32[8,16]{1,0} parameter(0)\n"
        "  %y = s32[8,16]{1,0} parameter(1)\n"
        "  ROOT %f = ((f32[8]{0}, s32[8]{0}), f32[8,16]{1,0}) fusion(%x, %y), kind=kLoop, calls=%body\n"
        "}\n"
    )
    assert program.traffic() == 2 * 512 + 2 * 32 + 512


def test_expected_cycles_count_as_often_as_a_loop_runs() -> None:
    cycles = 'backend_config={"flag_configs":[],"estimated_cycles":"100"}'
    kernel = '  %kernel = f32[1,16,16]{2,1,0} custom-call(%one), custom_call_target="tpu_custom_call"\n'
    text = PROGRAM.replace("calls=%fused_slice", f"calls=%fused_slice, {cycles}")
    text = text.replace("  ROOT %next =", f"{kernel}  ROOT %next =")
    program = parse_program(text)
    assert program.cycles() == 8 * 100
    assert program.unknown_kernels() == 8
    assert parse_program(PROGRAM).cycles() is None


@pytest.mark.parametrize("kernel", ["tpu.matmul", "tpu.matmul_transposed", "gpu.matmul"])
def test_products_of_4_bit_kernels_are_counted(kernel: str) -> None:
    from qlora_jax.quant import kernels

    module, name = kernel.split(".")
    function = getattr(getattr(kernels, module), name)
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((512, 256), jnp.float32))
    x = jax.ShapeDtypeStruct((24, 256 if "transposed" in name else 512), jnp.bfloat16)
    assert count_flops(jax.make_jaxpr(function)(x, w)) == 2 * 24 * 512 * 256
