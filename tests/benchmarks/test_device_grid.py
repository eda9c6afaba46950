"""The grid of small models by option and device: what it covers, and a sample of it through the real compilers."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qlora_jax.finetune.options.options import Options
from qlora_jax.models import FAMILIES
from scripts.benchmarks import device_grid as script

ROOT = Path(__file__).parents[2]
GROUPS = ("model", "lora", "optimizer", "objective", "tuning", "context")
# Options of these groups that do not change a program, or only the sizes and constants in it.
OF_NO_PROGRAM = {
    "model": {"model", "revision", "adapter"},
    "lora": {"alpha", "init_lora_weights", "loftq_iter", "exclude_modules", "layers_pattern"},
    "optimizer": {"learning_rate", "schedule", "warmup_ratio", "warmup_steps", "beta1", "beta2"},
    "objective": {"dpo_beta"},
    "tuning": {"feedforward_modules", "prompt_init", "prompt_init_text", "encoder_layers", "encoder_dropout"}
    | {"encoder_hidden_size", "save_dtype"},
    "context": set[str](),
}


def test_every_option_of_a_program_is_in_the_grid() -> None:
    changed = {(group, name) for option in script.OPTIONS.values() for group in GROUPS for name in option.get(group, {})}
    for group in GROUPS:
        names = {field.name for field in dataclasses.fields(getattr(Options(), group))}
        assert names - OF_NO_PROGRAM[group] == {name for of, name in changed if of == group}, group


def test_every_family_and_every_option_meets_every_device() -> None:
    arguments = script.Arguments()
    assert set(arguments.families) == set(FAMILIES)
    found = [cell for cell in script.cells(arguments) if cell.step == "train"]
    assert {(cell.family, cell.device) for cell in found if cell.option == "defaults"} == {
        (family, device) for family in FAMILIES for device in arguments.devices
    }
    assert {(cell.option, cell.device) for cell in found} == {
        (option, device) for option in script.OPTIONS for device in arguments.devices
    }
    others = Counter(cell.family for cell in found if cell.option != "defaults")
    assert max(others.values()) - min(others.values()) <= 1


def test_a_cell_that_is_refused_is_refused_by_the_quick_plan() -> None:
    """It is refused before anything is compiled."""
    cell = script.Cell("train", "gemma3_text", "prompt-tuning", "h100")
    result = script.compile_cell(cell)
    assert (result.outcome, result.good) == ("refused", True)
    assert "packing off" in result.line


@pytest.mark.integration
def test_a_sample_of_the_grid() -> None:
    """Layers with and without a window on two devices of a kind, which compilers refused once; about 20 CPU seconds."""
    for modules in (("jax_cuda13_plugin", "jax_cuda12_plugin"), ("libtpu",)):
        if not any(importlib.util.find_spec(module) for module in modules):
            pytest.skip(f"the compiler {modules[0]} is not installed")
    cells = ["--options", "2 devices", "--families", "qwen2", "gemma2", "--every", "2"]  # on GPUs one trains, one decodes
    command = [sys.executable, "-m", "scripts.benchmarks.device_grid", *cells]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
