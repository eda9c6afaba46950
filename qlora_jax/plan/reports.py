"""Reports of plans: the parts of the memory by name.

The arguments are known by kind. Of the temporaries the compiler reports only the sum; the saved residuals of the layers and
the gradients of the adapter are known from shapes, and the rest is working memory.
"""

import dataclasses
from functools import singledispatch
from typing import Any

import jax.numpy as jnp

from qlora_jax.models import ModelSpec
from qlora_jax.plan.compile import Plan
from qlora_jax.plan.decode import DecodePlan
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.quick import QuickPlan
from qlora_jax.plan.report import Report
from qlora_jax.plan.residuals import residual_bytes
from qlora_jax.plan.serving import ServingPlan
from qlora_jax.plan.tenants import TenantsPlan
from qlora_jax.train.dpo import with_reference
from qlora_jax.train.spec import StepSpec

COMPILED = "XLA's buffer assignment of the compiled program (GEMMs not autotuned)"
QUICK = "arithmetic: exact shapes, measured factors for working memory"


@singledispatch
def report_of(plan: Any, spec: StepSpec[ModelSpec], machine: Machine, title: str, seconds: float = 0.0) -> Report:
    """Return the report of a plan for one machine.

    Args:
        plan: the plan.
        spec: the step that was planned.
        machine: the machine.
        title: the heading of the report.
        seconds: the time that the plan took; a compiled plan knows its own.
    """
    raise TypeError(f"expected a plan, found {type(plan).__name__}")


@report_of.register
def _(plan: Plan, spec: StepSpec[ModelSpec], machine: Machine, title: str, seconds: float = 0.0) -> Report:
    program = plan.program
    saved, _ = residual_bytes(spec, machine.device.target)
    gradients = plan.adapter
    workspace = program.workspace - program.added_workspace
    rest = program.temporaries - saved - gradients
    known = plan.packed_weights + plan.dense_weights + plan.adapter + plan.optimizer
    notes = [("saved for the backward pass", saved), ("gradients of the adapter", gradients), ("working memory", rest)]
    # A program may free part of these before the peak. The split would be wrong then, and is left out.
    # The workspace is within the working memory: it exists only while attention's backward pass runs, which need not be at
    # the peak, so that it cannot be subtracted.
    notes = [*(notes if rest >= 0 else ()), *([("cuDNN's workspace, within it", workspace)] if workspace else ())]
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
            *((("cuDNN's workspace", program.added_workspace),) if program.added_workspace else ()),
        ),
        host=(
            ("optimizer", plan.host_optimizer),
            ("adapter", plan.host_adapter),
            # The optimizer's counters, a few bytes of its state, stay on the device.
            ("other arguments", max(program.host_arguments - plan.host_optimizer - plan.host_adapter, 0)),
            ("residuals and temporaries", program.host_temporaries),
        ),
        total=program.peak,
        flops=program.flops,
        traffic=program.traffic,
        seconds=program.compile_seconds,
        method=COMPILED,
        notes=tuple(("temporaries", what, size) for what, size in notes),
        cycles=program.cycles,
        unknown_kernels=program.unknown_kernels,
        values={"versions": plan.versions, "tokens": spec.tokens * spec.batch.micro_batches},
    )


@report_of.register
def _(plan: DecodePlan, spec: StepSpec[ModelSpec], machine: Machine, title: str, seconds: float = 0.0) -> Report:
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
        cycles=program.cycles,
        unknown_kernels=program.unknown_kernels,
        values={"versions": plan.versions, "rows": plan.rows, "bytes_a_token": program.traffic / spec.batch.batch_size},
    )


@report_of.register
def _(plan: TenantsPlan, spec: StepSpec[ModelSpec], machine: Machine, title: str, seconds: float = 0.0) -> Report:
    known = plan.packed_weights + plan.dense_weights + plan.adapter + plan.optimizer
    sums = plan.begin.outputs
    return Report(
        title=title,
        machine=machine,
        device=(
            ("packed weights", plan.packed_weights),
            ("other frozen weights", plan.dense_weights),
            ("adapters of all slots", plan.adapter),
            ("optimizer of all slots", plan.optimizer),
            ("gradients of all slots", sums),
            ("batch and temporaries", plan.peak - known - sums),
        ),
        host=(("states of tenants", plan.host),),
        total=plan.peak,
        flops=plan.flops,
        traffic=int(plan.traffic),
        seconds=plan.compile_seconds,
        method=COMPILED,
        values={
            "versions": plan.versions,
            "tenants": plan.tenants,
            "slots": plan.slots,
            "bytes_a_slot": (plan.adapter + plan.optimizer) // (plan.slots + 1),
        },
    )


@report_of.register
def _(plan: ServingPlan, spec: StepSpec[ModelSpec], machine: Machine, title: str, seconds: float = 0.0) -> Report:
    known = plan.packed_weights + plan.dense_weights + plan.bank + plan.cache + plan.sampling
    temporaries = plan.largest.peak - plan.largest.arguments
    of_programs = {
        name: {"peak": program.peak, "flops": program.flops, "traffic_bytes": program.traffic}
        for name, program in plan.programs.items()
    }
    return Report(
        title=title,
        machine=machine,
        device=(
            ("packed weights", plan.packed_weights),
            ("other frozen weights", plan.dense_weights),
            ("adapters of all slots", plan.bank),
            ("keys and values of all rows", plan.cache),
            ("logits and memory of sampling", plan.sampling),
            ("tokens and alignment", plan.peak - known - temporaries),
            ("temporaries", temporaries),
        ),
        host=(),
        total=plan.peak,
        flops=plan.decode.flops,
        traffic=plan.decode.traffic,
        seconds=sum(program.compile_seconds for program in plan.programs.values()),
        method=COMPILED,
        cycles=plan.decode.cycles,
        unknown_kernels=plan.decode.unknown_kernels,
        values={
            "versions": plan.versions,
            "rows": plan.rows,
            **dataclasses.asdict(plan.sizes),
            "bytes_a_row": (plan.cache + plan.sampling) // plan.rows,
            "bytes_a_slot": plan.bank // plan.sizes.slots(plan.rows),
            "programs": of_programs,
        },
    )


@report_of.register
def _(plan: QuickPlan, spec: StepSpec[ModelSpec], machine: Machine, title: str, seconds: float = 0.0) -> Report:
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
        notes=(("working memory (estimated)", "cuDNN's workspace", plan.workspace),) if plan.workspace else (),
    )


def spec_values(spec: StepSpec[ModelSpec]) -> dict[str, Any]:
    """Return the values of a spec by name, for JSON; those of the model's config are left out."""
    model, objective, batch, optimizer = spec.model, spec.objective, spec.batch, spec.optimizer
    return {
        "quantization": None if model.quantization is None else dataclasses.asdict(model.quantization),
        "embedding_storage": model.embedding_storage,
        "method": None if model.method is None else dataclasses.asdict(model.method),
        "dtype": jnp.dtype(model.dtype).name,
        "remat": model.remat,
        "objective": objective.name,
        "batch_size": batch.batch_size,
        "micro_batches": batch.micro_batches,
        "length": batch.length,
        "packed": objective.packed,
        "optimizer": optimizer.name,
        "host_optimizer": optimizer.host_optimizer,
        "host_adapter": optimizer.host_adapter,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "neftune_alpha": objective.neftune_alpha,
        "attention_groups": objective.attention_groups,
        "reference": objective.prepare is with_reference,
    }
