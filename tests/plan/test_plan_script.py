"""The command plan: a table and JSON, or one line for what is wrong; a real compilation where that can be."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.cli import parse
from qlora_jax.commands import plan as script
from qlora_jax.commands.planning import serving
from qlora_jax.errors import CheckpointError, DoesNotFitError
from qlora_jax.finetune.step import step_spec
from qlora_jax.models import ModelSpec, family_of
from qlora_jax.plan import (
    SIZES,
    CompilerMissing,
    Machine,
    Plan,
    Program,
    ServeSizes,
    ServingPlan,
    TenantsPlan,
    machine_named,
)
from qlora_jax.train import StepSpec

ROOT = Path(__file__).parents[2]
GIB = 2**30
PROGRAM = Program(6 * GIB, GIB, GIB, 4 * GIB, 2 * GIB, GIB, 2e12, 10**9, 1.5)
H100 = machine_named("h100")
PLAN = Plan(H100, 3 * GIB, 2 * GIB, GIB, 0, 0, 2 * GIB, PROGRAM, {"jax": "0"})


def test_the_last_line_is_json_with_method_versions_and_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def compiled(spec: StepSpec[ModelSpec], machine: Machine) -> Plan:
        asked.update(spec=spec, machine=machine)
        return PLAN

    monkeypatch.setattr(script, "check_compiler", lambda machine: None)
    monkeypatch.setattr(script, "compile_train_step", compiled)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", "llama-65b", "--rank", "32", "--host-offload"])
    assert script.main() == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["peak"] == 10 * GIB == sum(result["device_bytes"].values())
    assert result["device"] == "NVIDIA H100 80GB HBM3"
    assert result["versions"] == {"jax": "0"}
    assert result["method"]
    assert result["recipe"]["method"]["rank"] == 32
    assert result["floor_seconds"] == {"compute": 2e12 / 989.4e12, "memory": 1e9 / 3.35232e12}
    assert any(line.split()[:2] == ["total", "10.000"] for line in lines)
    spec = asked["spec"]
    assert spec.model.config.num_hidden_layers == 80
    assert spec.model.method.rank == 32
    assert spec.objective.packed
    assert spec.optimizer.host_optimizer
    assert spec.objective.name == "sft"
    assert asked["machine"] == H100


@pytest.mark.parametrize(
    ("name", "message"),
    [("bar.foo", "plot: expected a file that ends in one of"), ("none/bar.png", "plot: expected a folder that exists")],
)
def test_a_drawing_that_cannot_be_written_is_told_before_any_work(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--plot", str(tmp_path / name)])
    monkeypatch.setattr(script, "read_config", lambda model: pytest.fail("work before the check"))
    monkeypatch.setattr(script, "check_compiler", lambda machine: None)
    assert script.main() == 1
    assert message in capsys.readouterr().err


def test_a_recipe_of_train_py_means_the_same() -> None:
    """Every memory option of a config file, as the plan has it."""
    arguments = parse(
        script.PlanCommandOptions,
        description=None,
        arguments=["--config", str(ROOT / "recipes" / "guanaco-65b.toml"), "--device", "a100-80", "--optimizer", "lion"],
    )
    config = script.read_config(arguments.model.model)
    spec = step_spec(arguments, family_of(config).config(config), "cuda")
    assert (spec.model.method.rank, spec.model.method.dropout) == (64, 0.05)
    assert (spec.batch.batch_size, spec.batch.micro_batches, spec.batch.length) == (1, 16, 512)
    assert (spec.objective.packed, spec.optimizer.host_optimizer, spec.model.remat, spec.model.dtype) == (
        False,
        True,
        "full",
        "bfloat16",
    )
    assert (spec.optimizer.name, spec.optimizer.max_grad_norm) == ("lion", 0.3)
    assert arguments.plan.device == "a100-80"


def test_quick_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "check_compiler", lambda machine: pytest.fail("asked for a compiler"))
    flags = ["--model", "smollm2-135m", "--quick", "--device", "v5e:2x2", "--plot", str(tmp_path / "bar.png")]
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    assert script.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["devices"] == 4
    assert result["fits"]
    assert (tmp_path / "bar.png").exists()


def test_a_fit_is_searched_with_compilations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def compiled(spec: StepSpec[ModelSpec], machine: Machine) -> Plan:
        asked.append(spec.batch.batch_size)
        if spec.batch.batch_size > 30:
            raise DoesNotFitError("too large", None)
        program = dataclasses.replace(PROGRAM, temporaries=spec.batch.batch_size * GIB)
        return dataclasses.replace(PLAN, program=program)

    monkeypatch.setattr(script, "check_compiler", lambda machine: None)
    monkeypatch.setattr(script, "compile_train_step", compiled)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", "llama-3-8b", "--device", "rtx4090", "--fit", "batch"])
    assert script.main() == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["found"] == {"batch_size": 17}  # 6 GiB of arguments and 17 are within 23.65 GiB
    assert {17, 18} <= set(asked)
    assert len(asked) < 12
    assert "batch_size 18: 24.00 GiB" in captured.err


def test_the_most_tenants_that_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each slot takes one GiB in three parts; the report adds up to the peak, and turns need no more on the device."""
    asked: list[tuple[int, int | None]] = []

    def compiled(spec: Any, machine: Machine, *, tenants: int, rank: int, slots: int | None) -> TenantsPlan:
        asked.append((tenants, slots))
        held, small = min(slots or tenants, tenants), dataclasses.replace(PROGRAM, arguments=0, temporaries=GIB, aliased=0)
        begin = dataclasses.replace(small, outputs=held * GIB // 4, temporaries=0)
        update = dataclasses.replace(small, arguments=held * GIB, outputs=0)
        host = tenants * GIB if held < tenants else 0
        return TenantsPlan(
            machine, tenants, held, 3 * GIB, 2 * GIB, held * GIB // 4, held * GIB // 2, host, held, begin, small, update, {}
        )

    monkeypatch.setattr(script, "check_compiler", lambda machine: None)
    monkeypatch.setattr(script, "compile_tenants_step", compiled)
    assert script.main(["--model", "llama-65b", "--fit", "tenants"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    most = int((H100.device.memory_bytes - 6 * GIB) // GIB)
    assert result["found"] == {"tenants": most}
    assert {most, most + 1} <= {tenants for tenants, _ in asked}
    assert sum(result["device_bytes"].values()) == result["peak"] == (6 + most) * GIB
    assert script.main(["--model", "llama-65b", "--tenants", "2000", "--tenant-slots", "8"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["peak"], result["host_peak"]) == (14 * GIB, 2000 * GIB)
    for flags, message in (
        ("--tenants 4 --quick", "tenants: is a compiled training step"),
        ("--tenants 4 --optimizer lion", "tenants: optimizer.optimizer: expected 'adamw' among many tenants, found 'lion'"),
        ("--tenants 4 --objective dpo", "objective: expected sft, whose step is planned, found dpo"),
        ("--tenants 4 --accumulation-steps 2", "accumulation_steps: expected 1, a row of each tenant, found 2"),
        ("--fit tenants --use-dora", "cannot hold DoRA"),
        ("--tenant-slots 4", "tenant_slots: expected tenants beside it, found none"),
    ):
        assert script.main(["--model", "llama-65b", *flags.split()]) == 1
        assert message in capsys.readouterr().err


def test_the_most_rows_and_tenants_that_can_be_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row takes one GiB and so does a slot; the draws' program has the model beside it, and is the largest here."""

    def compiled(spec: Any, machine: Machine, sizes: ServeSizes) -> ServingPlan:
        rows, slots = spec.batch.batch_size, sizes.slots(spec.batch.batch_size)
        small = dataclasses.replace(PROGRAM, arguments=rows * GIB, temporaries=GIB, outputs=rows * GIB, aliased=rows * GIB)
        sample = dataclasses.replace(small, temporaries=2 * GIB)
        model = dataclasses.replace(small, arguments=(rows + slots + 5) * GIB)
        return ServingPlan(machine, rows, sizes, 3 * GIB, 2 * GIB, slots * GIB, rows * GIB, 0, model, model, sample, {})

    monkeypatch.setattr(script, "check_compiler", lambda machine: None)
    monkeypatch.setattr(serving, "compile_serving", compiled)
    most, flags = int(H100.device.memory_bytes // GIB), ["--model", "llama-65b", "--step", "serve", "--batch-size", "16"]
    for fit, name, expected in (("tenants", "tenants", most - 8 - 16), ("batch", "rows", most - 8 - 40)):
        assert script.main([*flags, "--tenants", "40", "--tenant-rank", "8", "--fit", fit]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["found"] == {name: expected} == {name: result[name]}
        assert (result["rank"], result["chunk"], result["bytes_a_slot"]) == (8, 128, GIB)
        assert sum(result["device_bytes"].values()) == result["peak"] == most * GIB
        assert result["programs"]["decode"]["peak"] == (most - 1) * GIB
    for wrong in ("--quick", "--fit length", "--tenants 8 --tenant-slots 4"):
        assert script.main([*flags, *wrong.split()]) == 1
        assert "step serve: is compiled for one device" in capsys.readouterr().err


def test_what_cannot_fit_is_told_with_what_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "llama-65b", "--device", "rtx4090", "--quick", "--fit", "batch"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    assert script.main() == 1
    error = capsys.readouterr().err
    assert "batch_size 1 does not fit rtx4090" in error
    assert "--device rtx4090x" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "z80"], "unknown device 'z80'"),
        (["--model", "llama-9b"], "no size by that name; did you mean llama-7b"),
        (["--capacity", "0"], "capacity: expected at least 1, found 0"),
        (["--rank", "0"], "LoRA rank"),
        (["--device", "h100x4", "--mesh", "tensor=2"], "expected as many devices as there are, 4, found 1 x 1 x 2 = 2"),
        (
            ["--device", "h100x4", "--mesh", "tensor=4"],
            "mesh tensor=4: expected a divisor of the model's num_attention_heads, 9",
        ),
        (["--device", "h100x4", "--mesh", "data=4", "--tenants", "2"], "tenants: train with all devices along fsdp"),
        (["--device", "h100x4", "--mesh", "data=4", "--fit", "options"], "fit options: chooses the number of devices"),
    ],
)
def test_what_is_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(script, "check_compiler", lambda machine: None)
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    assert script.main() == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_missing_compiler_is_one_line_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(machine: Any) -> None:
        raise CompilerMissing('needs CUDA: pip install "qlora-jax[cuda]"')

    monkeypatch.setattr(script, "check_compiler", missing)
    monkeypatch.setattr(script, "read_config", lambda model: pytest.fail("read"))
    monkeypatch.setattr(sys, "argv", ["plan.py"])
    assert script.main() == 1
    assert capsys.readouterr().err == 'error: needs CUDA: pip install "qlora-jax[cuda]"\n'


def test_a_config_is_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES["llama-7b"]))
    assert script.read_config(str(tmp_path)) == SIZES["llama-7b"]
    assert script.read_config(str(tmp_path / "config.json")) == SIZES["llama-7b"]
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        script.read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        script.read_config(str(tmp_path))


def test_help_needs_no_compiler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "check_compiler", lambda machine: pytest.fail("asked for a compiler"))
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--host-offload" in shown
    assert "--fit" in shown
