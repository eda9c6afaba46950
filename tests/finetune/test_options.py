"""Options that mean nothing, by themselves or beside one another, in one clear error each."""

from pathlib import Path
from typing import Any

import pytest

from qlora_jax.checkpoint.whole_folder import whole_folder
from qlora_jax.cli import parse
from qlora_jax.finetune import DataOptions, OptimizerOptions, Options, RunOptions
from qlora_jax.finetune.objectives.dpo import DPO
from qlora_jax.finetune.objectives.sft import SFT
from qlora_jax.peft import LoRA, Option, by_name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adafactor", "beta1": 0.8}, r"beta1: expected none with the optimizer adafactor, found 0\.8"),
        ({"optimizer": "adafactor", "beta2": 0.8}, r"beta2: expected none with the optimizer adafactor, found 0\.8"),
        ({"beta1": -0.1}, r"beta1: expected 0 to below 1, found -0\.1"),
        ({"optimizer": "lion", "beta2": 1.0}, r"beta2: expected 0 to below 1, found 1\.0"),
        ({"neftune_alpha": -1.0}, r"neftune_alpha: expected a number of at least 0, found -1\.0"),
        ({"optimizer": "sgd"}, "optimizer: expected one of adamw, adamw8bit, lion, adafactor, found 'sgd'"),
    ],
)
def test_optimizer_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**fields)


def test_the_learning_rate_of_lion_is_a_tenth() -> None:
    for parameters in (1e8, 7e9, 65e9):
        plain = OptimizerOptions().peak_learning_rate(int(parameters), SFT, LoRA())
        assert OptimizerOptions(optimizer="lion").peak_learning_rate(int(parameters), SFT, LoRA()) == plain / 10
    assert OptimizerOptions(optimizer="lion", learning_rate=1e-3).peak_learning_rate(1, SFT, LoRA()) == 1e-3


def test_the_learning_rate_of_dpo_is_lower() -> None:
    rates = [OptimizerOptions().peak_learning_rate(int(size), DPO, LoRA()) for size in (1e8, 7e9, 65e9)]
    assert rates == [5e-5, 5e-6, 5e-6]
    assert OptimizerOptions(learning_rate=1e-3).peak_learning_rate(1, DPO, LoRA()) == 1e-3


def test_early_stopping_needs_evaluations() -> None:
    with pytest.raises(ValueError, match="early_stopping_patience: expected at least 0, found -1"):
        RunOptions(early_stopping_patience=-1)
    with pytest.raises(ValueError, match="early_stopping_patience: expected eval_every of at least 1, found 0"):
        RunOptions(early_stopping_patience=2, eval_every=0)
    run = RunOptions(early_stopping_patience=2)
    with pytest.raises(
        ValueError, match="early_stopping_patience: expected held-out data, found held_out 0 and no eval_data"
    ):
        Options(data=DataOptions(held_out=0.0), run=run).check()
    Options(data=DataOptions(held_out=0.0, eval_data="more.jsonl"), run=run).check()
    Options(run=run).check()


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run"])
def test_an_address_is_no_output(address: str) -> None:
    """Otherwise a folder named gs: or s3: would appear where the command runs."""
    with pytest.raises(
        ValueError, match=rf"output {address[:2]}:/bucket/run: expected a folder of this machine, found an addr"
    ):
        RunOptions(output=Path(address))
    with (
        pytest.raises(ValueError, match=f"folder {address}: expected a folder of this machine"),
        whole_folder(address, marker="a"),
    ):
        pass


def test_the_adapter_that_flags_and_tables_describe(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[lora]\nlayers_to_transform = [0, 3]\n[lora.rank_pattern]\n"layers\\\\.0\\\\..*" = 8\nq_proj = 4\n')
    flags = ["--config", str(config), "--alpha-pattern", "v_proj", "3", "o_proj", "2.5", "--modules-to-save", "norm"]
    lora = parse(Options, description="", arguments=[*flags, "--trainable-token-indices", "7", "5"]).lora.build()
    assert lora == LoRA(
        layers_to_transform=(0, 3),
        rank_pattern=((r"layers\.0\..*", 8), ("q_proj", 4)),
        alpha_pattern=(("v_proj", 3.0), ("o_proj", 2.5)),
        modules_to_save=("norm",),
        trainable_token_indices=(7, 5),
    )
    config.write_text("[lora.rank_pattern]\nq_proj = 4.5\n")
    with pytest.raises(ValueError, match=r"lora\.rank_pattern: expected .*found \{'q_proj': 4\.5\}"):
        parse(Options, description="", arguments=["--config", str(config)])


def test_two_options_of_one_name_are_an_error_that_names_both_owners() -> None:
    declared = [Option("size", int, 1, "A size."), Option("size", int, 2, "Another size.")]
    with pytest.raises(TypeError, match=r"option size: expected one declaration, .*, found one of ia3 and one of mine"):
        by_name({"ia3": declared[:1], "mine": declared[1:]})
    assert by_name({"ia3": declared[:1], "mine": declared[:1]}) == {"size": declared[0]}
