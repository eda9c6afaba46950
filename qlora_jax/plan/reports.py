"""Reports of plans: which part of the memory is what.

The arguments are known by kind. Of the temporaries the compiler tells the sum alone; what the layers keep for the backward
pass and the adapter's gradients are known from shapes, and the rest is what lives beside them.
"""

from functools import singledispatch
from typing import Any

from qlora_jax.plan.compile import Plan
from qlora_jax.plan.decode import DecodePlan
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.quick import QuickPlan, residual_bytes
from qlora_jax.plan.recipe import Recipe
from qlora_jax.plan.report import Report

COMPILED = "XLA's buffer assignment of the compiled program (GEMMs not autotuned)"
QUICK = "arithmetic: exact shapes, measured factors for working memory"


@singledispatch
def report_of(plan: Any, recipe: Recipe, machine: Machine, title: str, seconds: float = 0.0) -> Report:
    """The report of a plan for one machine."""
    raise TypeError(f"expected a plan, found {type(plan).__name__}")


@report_of.register
def _(plan: Plan, recipe: Recipe, machine: Machine, title: str, seconds: float = 0.0) -> Report:
    program = plan.program
    kept, _ = residual_bytes(recipe)
    gradients = plan.adapter
    rest = program.temporaries - kept - gradients
    known = plan.packed_weights + plan.dense_weights + plan.adapter + plan.optimizer
    notes = (("saved for the backward pass", kept), ("gradients of the adapter", gradients), ("working memory", rest))
    return Report(
        title=title,
        machine=machine,
        device=(
            ("packed weights", plan.packed_weights),
            ("other frozen weights", plan.dense_weights),
            ("adapter", plan.adapter),
            ("optimizer", plan.optimizer),
            ("batch and alignment", program.arguments - known),
            ("temporaries", program.temporaries),
            ("outputs outside the donated state", program.outputs - program.aliased),
        ),
        host=(
            ("optimizer", plan.host_optimizer),
            ("adapter", plan.host_adapter),
            # Counters of the optimizer stay on the device: a few bytes less than its state.
            ("other arguments", max(program.host_arguments - plan.host_optimizer - plan.host_adapter, 0)),
            ("residuals and temporaries", program.host_temporaries),
        ),
        total=program.peak,
        flops=program.flops,
        traffic=program.traffic,
        seconds=program.compile_seconds,
        method=COMPILED,
        # Where a program frees part of what shapes say before the worst moment, the split would be wrong: none is given.
        notes=tuple(("temporaries", what, size) for what, size in notes) if rest >= 0 else (),
        figures={"versions": plan.versions, "tokens": recipe.tokens * recipe.micro_batches},
    )


@report_of.register
def _(plan: DecodePlan, recipe: Recipe, machine: Machine, title: str, seconds: float = 0.0) -> Report:
    program = plan.program
    known = plan.packed_weights + plan.dense_weights + plan.adapter + plan.cache
    return Report(
        title=title,
        machine=machine,
        device=(
            ("packed weights", plan.packed_weights),
            ("other frozen weights", plan.dense_weights),
            ("adapter", plan.adapter),
            ("cache", plan.cache),
            ("tokens and alignment", program.arguments - known),
            ("temporaries", program.temporaries),
            ("outputs outside the donated cache", program.outputs - program.aliased),
        ),
        host=(),
        total=program.peak,
        flops=program.flops,
        traffic=program.traffic,
        seconds=program.compile_seconds,
        method=COMPILED,
        figures={"versions": plan.versions, "rows": plan.rows, "bytes_a_token": program.traffic / recipe.batch_size},
    )


@report_of.register
def _(plan: QuickPlan, recipe: Recipe, machine: Machine, title: str, seconds: float = 0.0) -> Report:
    return Report(
        title=title,
        machine=machine,
        device=(
            ("packed weights", plan.packed_weights),
            ("other frozen weights", plan.dense_weights),
            ("adapter", plan.adapter),
            ("optimizer", plan.optimizer),
            ("batch", plan.batch),
            ("saved for the backward pass", plan.residuals),
            ("gradients of the adapter", plan.gradients),
            ("working memory (estimated)", plan.working),
        ),
        host=(
            ("optimizer", plan.host_optimizer),
            ("adapter and its gradient", plan.host_adapter),
            ("residuals", plan.host_residuals),
        ),
        total=plan.peak,
        flops=None,
        traffic=None,
        seconds=seconds,
        method=QUICK,
    )
