"""Operations of traced programs and bytes of compiled ones, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from tiny_llama import TINY

from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.plan.flops import count_flops
from qlora_jax.plan.hlo import parse_program
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
