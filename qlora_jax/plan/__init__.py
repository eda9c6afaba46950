"""What a training step or a decode step needs on a device: from its compiler, without the hardware, or by arithmetic."""

from qlora_jax.plan.compile import DoesNotFit, Plan, Program, compile_train_step
from qlora_jax.plan.decode import DecodePlan, compile_decode_step
from qlora_jax.plan.devices import DEVICES, Device, Machine, machine_named
from qlora_jax.plan.fit import Choice, cheaper_first, cheapest_that_fits, largest_that_fits
from qlora_jax.plan.quick import QuickPlan, quick_plan
from qlora_jax.plan.recipe import PlannedObjective, Recipe
from qlora_jax.plan.report import Report, as_json, check_drawing, draw, table
from qlora_jax.plan.reports import report_of
from qlora_jax.plan.sizes import HUB_IDS, SIZES
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
    "DoesNotFit",
    "Machine",
    "Plan",
    "PlannedObjective",
    "Program",
    "QuickPlan",
    "Recipe",
    "Report",
    "as_json",
    "cheaper_first",
    "cheapest_that_fits",
    "check_compiler",
    "check_drawing",
    "compile_decode_step",
    "compile_train_step",
    "draw",
    "largest_that_fits",
    "machine_mesh",
    "machine_named",
    "quick_plan",
    "report_of",
    "table",
]
