"""The workspace of cuDNN's attention: its size by hand, and where programs get it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_llama import changed

from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.plan import SIZES, machine_named, quick_plan, report_of, table
from qlora_jax.plan.hlo import parse_program
from qlora_jax.plan.workspace import add_workspaces, attention_workspace, missing_workspace
from qlora_jax.train import BatchSpec, StepSpec, language_model_objective

GRADIENTS = "(bf16[2,8,128,64]{3,1,2,0}, bf16[2,2,128,64]{3,1,2,0}, bf16[2,2,128,64]{3,1,2,0}"
ACCUMULATORS = 2 * 8 * 128 * (64 + 1) * 4


def test_its_size() -> None:
    """32 heads of 128 features, 32,768 tokens: half a GiB of accumulators, and 4 MiB of sums."""
    assert attention_workspace(1, 32, 32768, 128) == 2**29 + 2**22


def hlo(results: str, target: str = "__cudnn$fmhaSoftmaxBackward") -> str:
    return (
        "ENTRY %main (q: bf16[2,128,8,64], s: f32[2,8,128]) -> bf16[2,8,128,64] {\n"
        "  %q = bf16[2,128,8,64]{3,2,1,0} parameter(0)\n"
        "  %s = f32[2,8,128]{2,1,0} parameter(1)\n"
        f'  %c = {results} custom-call(%q, %q, %q, %s, %q, %q), custom_call_target="{target}"\n'
        "  ROOT %g = bf16[2,8,128,64]{3,1,2,0} get-tuple-element(%c), index=0\n"
        "}\n"
    )


@pytest.mark.parametrize(
    ("results", "target", "expected"),
    [
        (f"{GRADIENTS}, u8[0]{{0}})", "__cudnn$fmhaSoftmaxBackward", ACCUMULATORS),
        (f"{GRADIENTS}, u8[7]{{0}})", "__cudnn$fmhaSoftmaxBackward", 0),  # it has its memory
        ("(bf16[2,8,128,64]{3,1,2,0}, f32[2,8,128]{2,1,0}, u8[0]{0})", "__cudnn$fmhaSoftmax", 0),  # forward
    ],
)
def test_what_a_compiled_program_lacks(results: str, target: str, expected: int) -> None:
    assert missing_workspace(parse_program(hlo(results, target))) == expected


def test_a_lowered_program_gets_it() -> None:
    from jax.extend.mlir import ir

    lowered = jax.jit(lambda x: x).lower(jnp.zeros(()))
    query, small, scores = "tensor<2x8x128x64xbf16>", "tensor<2x2x128x64xbf16>", "tensor<2x8x128xf32>"
    text = f"""
    func.func public @main(%q: {query}, %s: {scores}) -> {query} {{
      %0:4 = stablehlo.custom_call @"__cudnn$fmhaSoftmaxBackward"(%q, %q, %q, %s, %q, %q)
        : ({query}, {query}, {query}, {scores}, {query}, {query}) -> ({query}, {small}, {small}, tensor<0xui8>)
      return %0#0 : {query}
    }}"""
    module = ir.Module.parse(text, lowered.compiler_ir().context)  # type: ignore[union-attr]
    assert add_workspaces(module) == ACCUMULATORS
    assert f"tensor<{ACCUMULATORS}xui8>" in str(module)
    assert module.operation.verify()
    assert add_workspaces(lowered.compiler_ir()) == 0


def test_the_quick_plan_says_it() -> None:
    spec = StepSpec(
        ModelSpec(llama_config(SIZES["llama-3-8b"]), method=LoRA(16), remat="offload"),
        language_model_objective(packed=False),
        BatchSpec(length=32768),
    )
    plan = quick_plan(spec, "cuda")
    assert plan.workspace == 2**29 + 2**22
    assert "of it cuDNN's workspace" in table(report_of(plan, spec, machine_named("h100"), "title"))
    # Of packed rows, the right halves of the heads that are computed at a time.
    packed = dataclasses.replace(spec, objective=language_model_objective())
    assert quick_plan(packed, "cuda").workspace == 16384 * 4 * (128 + 1) * 4
    assert quick_plan(spec, "tpu").workspace == quick_plan(changed(spec, model={"dtype": "float32"}), "cuda").workspace == 0
