"""The memory and time that a training step, a decode step or a server needs on a device, from its compiler or by arithmetic.

Neither needs the device itself. The step is described by a `train.StepSpec` whose model is a `models.ModelSpec`.
"""

from qlora_jax.plan.compile import Plan, Program, compile_train_step
from qlora_jax.plan.decode import DecodePlan, compile_decode_step
from qlora_jax.plan.devices import DEVICES, Device, Machine, machine_named
from qlora_jax.plan.fit import Choice, cheaper_first, cheapest_that_fits, largest_that_fits
from qlora_jax.plan.quick import QuickPlan, quick_plan
from qlora_jax.plan.report import Report, as_json, check_drawing, draw, table
from qlora_jax.plan.reports import report_of, spec_values
from qlora_jax.plan.serving import ServeSizes, ServingPlan, compile_serving
from qlora_jax.plan.sizes import HUB_IDS, SIZES
from qlora_jax.plan.tenants import TenantsPlan, compile_tenants_step
from qlora_jax.plan.topology import CompilerMissing, CompilerRefuses, check_compiler, machine_mesh

__all__ = [
    "DEVICES",
    "HUB_IDS",
    "SIZES",
    "Choice",
    "CompilerMissing",
    "CompilerRefuses",
    "DecodePlan",
    "Device",
    "Machine",
    "Plan",
    "Program",
    "QuickPlan",
    "Report",
    "ServeSizes",
    "ServingPlan",
    "TenantsPlan",
    "as_json",
    "cheaper_first",
    "cheapest_that_fits",
    "check_compiler",
    "check_drawing",
    "compile_decode_step",
    "compile_serving",
    "compile_tenants_step",
    "compile_train_step",
    "draw",
    "largest_that_fits",
    "machine_mesh",
    "machine_named",
    "quick_plan",
    "report_of",
    "spec_values",
    "table",
]
