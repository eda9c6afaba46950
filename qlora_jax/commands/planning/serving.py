"""The plan of a serving engine: what it takes, and the most rows or tenants that fit."""

import dataclasses
import sys
from typing import Any, Literal

from qlora_jax.errors import DoesNotFitError
from qlora_jax.models import ModelSpec
from qlora_jax.plan import Machine, Report, ServeSizes, ServingPlan, compile_serving, largest_that_fits, report_of
from qlora_jax.train import StepSpec

__all__ = ["serving_report"]


def serving_report(
    spec: StepSpec[ModelSpec], machine: Machine, model: str, sizes: ServeSizes, fit: Literal["none", "batch", "tenants"]
) -> tuple[dict[str, Any], Report]:
    """Return (what was found by its name, the report of the engine).

    Args:
        spec: the model; its batch size is the number of rows.
        machine: one device.
        model: the name of the model, for the title.
        sizes: the engine's other sizes.
        fit: search for the most rows ("batch") or tenants that fit, from those of `spec` or `sizes` on.

    Raises:
        DoesNotFitError: not even one row or tenant fits.
    """
    plans: dict[int, ServingPlan] = {}
    limit, name = machine.device.memory_bytes, "rows" if fit == "batch" else "tenants"

    def peak(number: int) -> int:
        own_spec, own = spec, sizes
        if fit == "batch":
            own_spec = dataclasses.replace(spec, batch=dataclasses.replace(spec.batch, batch_size=number))
        else:
            own = dataclasses.replace(sizes, tenants=number)
        try:
            plans[number] = plan = compile_serving(own_spec, machine, own)
        except DoesNotFitError as error:
            if fit == "none":
                raise
            return max(error.needed or 0, limit + 1)
        print(f"{name} {number}: {plan.peak / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        return plan.peak

    number, found = sizes.tenants, {}
    if fit == "none":
        peak(number)
    else:
        start = spec.batch.batch_size if fit == "batch" else max(sizes.tenants, 16)
        best = largest_that_fits(peak, limit, start=start)
        if best is None:
            raise DoesNotFitError(f"{name} 1 does not fit {machine.name}, which has {limit:,} bytes")
        number, found = best[0], {name: best[0]}
    plan = plans[number]
    tenants = f"{plan.sizes.tenants} tenants of rank {plan.sizes.rank}, " if plan.sizes.tenants else ""
    title = f"{model}: serving {tenants}{plan.rows} x {plan.sizes.capacity}"
    return found, report_of(plan, spec, machine, title)
