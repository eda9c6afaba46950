"""A run that cannot fit is refused with what would make it fit; options become the step that the job runs."""

import dataclasses

import pytest

from qlora_jax.cli import parse
from qlora_jax.finetune import (
    DataOptions,
    LoRAOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    Options,
    RunOptions,
)
from qlora_jax.finetune.folder import record_of
from qlora_jax.finetune.memory import check_against, memory_limit
from qlora_jax.finetune.step import step_spec
from qlora_jax.models.llama import llama_config
from qlora_jax.plan import SIZES, quick_plan, spec_values
from qlora_jax.train.spec import unchanged

LLAMA = llama_config(SIZES["llama-3-8b"])
GIB = 2**30


def test_options_are_the_step() -> None:
    options = Options(
        model=ModelOptions(data_type="fp4", remat="offload"),
        lora=LoRAOptions(rank=8, special_tokens=("<a>", "<b>")),
        data=DataOptions(max_length=513, group_by_length=True),
        optimizer=OptimizerOptions(optimizer="adamw8bit", host_offload=True, max_grad_norm=0.0),
        run=RunOptions(batch_size=3, accumulation_steps=5),
    )
    spec = step_spec(options, LLAMA, "gpu")
    model, batch, optimizer = spec.model, spec.batch, spec.optimizer
    assert (model.dtype, model.remat, batch.length, spec.objective.packed) == ("bfloat16", "offload", 512, False)
    assert (batch.batch_size, batch.micro_batches) == (3, 5)
    assert (optimizer.name, optimizer.host_optimizer, optimizer.max_grad_norm) == ("adamw8bit", True, None)
    assert model.quantization is not None
    assert model.quantization.data_type == "fp4"
    assert model.config.vocab_size == 128258
    assert model.method.trainable_token_indices == (128256, 128257)
    on_cpu = step_spec(Options(), LLAMA, "cpu")
    assert (on_cpu.model.dtype, on_cpu.model.remat, on_cpu.batch.length, on_cpu.objective.packed) == (
        "float32",
        "dots",
        512,
        True,
    )
    pairs = step_spec(Options(objective=ObjectiveOptions(objective="dpo")), LLAMA, "gpu")
    assert (pairs.objective.name, pairs.objective.packed, pairs.objective.prepare) == ("dpo", False, unchanged)


def test_a_run_that_fits_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlora_jax")
    spec = step_spec(Options(), LLAMA, "gpu")
    check_against(spec, "gpu", 1, 80 * GIB)
    assert caplog.messages == []
    check_against(spec, "gpu", 1, quick_plan(spec, "cuda").peak)
    assert "tight" in caplog.messages[0]


def test_what_is_proposed_fits() -> None:
    options = Options(data=DataOptions(max_length=2048), run=RunOptions(batch_size=16))
    spec = step_spec(options, LLAMA, "gpu")
    with pytest.raises(ValueError, match=r"the run needs about .* each device has 12.00 GiB: this would fit: --") as refused:
        check_against(spec, "gpu", 1, 12 * GIB)
    words = str(refused.value).split("this would fit: ")[1].split(" (")[0].split()
    asked = ["--max-length", "2048", *([] if "--batch-size" in words else ["--batch-size", "16"]), *words]
    proposed = step_spec(parse(Options, description=None, arguments=asked), LLAMA, "gpu")
    assert proposed.batch.batch_size * proposed.batch.micro_batches == spec.batch.batch_size * spec.batch.micro_batches
    assert spec_values(proposed) != spec_values(spec)
    assert quick_plan(proposed, "cuda").peak < 12 * GIB


def test_what_can_never_fit_says_so() -> None:
    spec = step_spec(Options(), llama_config(SIZES["llama-65b"]), "gpu")
    with pytest.raises(ValueError, match="nothing that the options can do would fit"):
        check_against(spec, "gpu", 1, 8 * GIB)


HOST = OptimizerOptions(host_adapter=True)


@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
def test_a_host_that_is_too_small_is_told(share: float) -> None:
    """Each of four devices has its own copy of what lies in host memory."""
    options = Options(model=ModelOptions(remat="offload"), data=DataOptions(max_length=2048), optimizer=HOST)
    spec = step_spec(options, LLAMA, "gpu")
    need = quick_plan(spec, "cuda", 4).host_peak
    check_against(spec, "gpu", 4, 40 * GIB, host_limit=need)
    limit = int(share * need)
    with pytest.raises(ValueError, match=r"keeps .* in host memory for each device, this machine has") as refused:
        check_against(spec, "gpu", 4, 40 * GIB, host_limit=limit)
    words = str(refused.value).split("this would fit: ")[1].split(" (")[0].split()
    asked = ["--max-length", "2048", *([] if "--remat" in words else ["--remat", "offload"]), *words]
    asked += [] if "--no-host-adapter" in words else ["--host-adapter"]
    proposed = step_spec(parse(Options, description=None, arguments=asked), LLAMA, "gpu")
    plan = quick_plan(proposed, "cuda", 4)
    assert plan.host_peak <= limit
    assert plan.peak <= 40 * GIB
    assert proposed.batch.batch_size * proposed.batch.micro_batches == spec.batch.batch_size * spec.batch.micro_batches
    if share < 0.1:  # the smallest of it goes back to the device
        assert not proposed.optimizer.host_adapter
        assert not proposed.optimizer.host_optimizer


def test_a_host_and_a_device_that_are_too_small_are_told_together() -> None:
    spec = step_spec(Options(optimizer=HOST), llama_config(SIZES["llama-65b"]), "gpu")
    with pytest.raises(ValueError, match=r"each device has 8.00 GiB and the run keeps .* nothing that the options can do"):
        check_against(spec, "gpu", 1, 8 * GIB, host_limit=GIB)


def test_on_a_cpu_only_what_is_known_counts() -> None:
    spec = step_spec(Options(), LLAMA, "cpu")
    plan = quick_plan(spec, "cpu")
    check_against(spec, "cpu", 1, plan.exact)  # the estimated part may be wrong there
    with pytest.raises(ValueError, match=r"needs at least .* this machine has"):
        check_against(spec, "cpu", 1, plan.exact - GIB)


def test_what_is_proposed_on_a_cpu_fits_with_the_guess_and_moves_nothing_to_the_host() -> None:
    spec = step_spec(Options(run=RunOptions(batch_size=4096)), llama_config(SIZES["smollm2-135m"]), "cpu")
    with pytest.raises(ValueError, match="this would fit: ") as refused:
        check_against(spec, "cpu", 1, 16 * GIB)
    words = str(refused.value).split("this would fit: ")[1].split(" (")[0].split()
    changes = dict(zip(words[::2], words[1::2], strict=True))
    assert changes.keys() == {"--remat", "--batch-size", "--accumulation-steps"}
    smaller = dataclasses.replace(
        spec,
        model=dataclasses.replace(spec.model, remat="full"),
        batch=dataclasses.replace(
            spec.batch,
            batch_size=int(changes["--batch-size"]),
            micro_batches=int(changes["--accumulation-steps"]),
        ),
    )
    assert smaller.batch.batch_size * smaller.batch.micro_batches == 4096
    assert quick_plan(smaller, "cpu").peak <= 16 * GIB


def test_the_limit_of_this_machine_is_known() -> None:
    limit = memory_limit()
    assert limit is None or limit > GIB / 8


def test_the_check_is_no_part_of_what_a_run_is() -> None:
    assert record_of(Options()) == record_of(Options(run=RunOptions(memory_check=False)))
