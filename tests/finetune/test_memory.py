"""A run that cannot fit is refused with what would make it fit; options become the recipe that the job runs."""

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
from qlora_jax.finetune.memory import check_against, memory_limit, recipe_of
from qlora_jax.models.llama import llama_config
from qlora_jax.plan import SIZES, quick_plan

LLAMA = llama_config(SIZES["llama-3-8b"])
GIB = 2**30


def test_options_are_the_recipe() -> None:
    options = Options(
        model=ModelOptions(data_type="fp4", remat="offload"),
        lora=LoRAOptions(rank=8, special_tokens=("<a>", "<b>")),
        data=DataOptions(max_length=513, group_by_length=True),
        optimizer=OptimizerOptions(optimizer="adamw8bit", host_offload=True, max_grad_norm=0.0),
        run=RunOptions(batch_size=3, accumulation_steps=5),
    )
    recipe = recipe_of(options, LLAMA, "gpu")
    assert (recipe.dtype, recipe.remat, recipe.length, recipe.packed) == ("bfloat16", "offload", 512, False)
    assert (recipe.batch_size, recipe.micro_batches) == (3, 5)
    assert (recipe.optimizer, recipe.host_optimizer, recipe.max_grad_norm) == ("adamw8bit", True, None)
    assert recipe.quantization is not None
    assert recipe.quantization.data_type == "fp4"
    assert recipe.config.vocab_size == 128258
    assert recipe.method.trainable_token_indices == (128256, 128257)
    on_cpu = recipe_of(Options(), LLAMA, "cpu")
    assert (on_cpu.dtype, on_cpu.remat, on_cpu.length, on_cpu.packed) == ("float32", "dots", 512, True)
    pairs = recipe_of(Options(objective=ObjectiveOptions(objective="dpo")), LLAMA, "gpu")
    assert (pairs.objective, pairs.packed, pairs.reference) == ("dpo", False, False)


def test_a_run_that_fits_goes_on() -> None:
    said: list[str] = []
    recipe = recipe_of(Options(), LLAMA, "gpu")
    check_against(recipe, "gpu", 1, 80 * GIB, said.append)
    assert said == []
    check_against(recipe, "gpu", 1, quick_plan(recipe, "cuda").peak, said.append)
    assert "tight" in said[0]


def test_what_is_proposed_fits() -> None:
    options = Options(data=DataOptions(max_length=2048), run=RunOptions(batch_size=16))
    recipe = recipe_of(options, LLAMA, "gpu")
    with pytest.raises(ValueError, match=r"the run needs about .* each device has 12.00 GiB: this would fit: --") as refused:
        check_against(recipe, "gpu", 1, 12 * GIB, print)
    words = str(refused.value).split("this would fit: ")[1].split(" (")[0].split()
    asked = ["--max-length", "2048", "--batch-size", "16", *words]  # the last of an option counts
    proposed = recipe_of(parse(Options, description=None, arguments=asked), LLAMA, "gpu")
    assert proposed.batch_size * proposed.micro_batches == recipe.batch_size * recipe.micro_batches
    assert proposed != recipe
    assert quick_plan(proposed, "cuda").peak < 12 * GIB


def test_what_can_never_fit_says_so() -> None:
    recipe = recipe_of(Options(), llama_config(SIZES["llama-65b"]), "gpu")
    with pytest.raises(ValueError, match="nothing that the options can do would fit"):
        check_against(recipe, "gpu", 1, 8 * GIB, print)


HOST = OptimizerOptions(host_adapter=True)


@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
def test_a_host_that_is_too_small_is_told(share: float) -> None:
    """Each of four devices has its own copy of what lies in host memory."""
    options = Options(model=ModelOptions(remat="offload"), data=DataOptions(max_length=2048), optimizer=HOST)
    recipe = recipe_of(options, LLAMA, "gpu")
    need = quick_plan(recipe, "cuda", 4).host_peak
    check_against(recipe, "gpu", 4, 40 * GIB, print, host_limit=need)
    limit = int(share * need)
    with pytest.raises(ValueError, match=r"keeps .* in host memory for each device, this machine has") as refused:
        check_against(recipe, "gpu", 4, 40 * GIB, print, host_limit=limit)
    words = str(refused.value).split("this would fit: ")[1].split(" (")[0].split()
    asked = ["--max-length", "2048", "--remat", "offload", "--host-adapter", *words]
    proposed = recipe_of(parse(Options, description=None, arguments=asked), LLAMA, "gpu")
    plan = quick_plan(proposed, "cuda", 4)
    assert plan.host_peak <= limit
    assert plan.peak <= 40 * GIB
    assert proposed.batch_size * proposed.micro_batches == recipe.batch_size * recipe.micro_batches
    if share < 0.1:  # the smallest of it goes back to the device
        assert not proposed.host_adapter
        assert not proposed.host_optimizer


def test_a_host_and_a_device_that_are_too_small_are_told_together() -> None:
    recipe = recipe_of(Options(optimizer=HOST), llama_config(SIZES["llama-65b"]), "gpu")
    with pytest.raises(ValueError, match=r"each device has 8.00 GiB and the run keeps .* nothing that the options can do"):
        check_against(recipe, "gpu", 1, 8 * GIB, print, host_limit=GIB)


def test_on_a_cpu_only_what_is_known_counts() -> None:
    recipe = recipe_of(Options(), LLAMA, "cpu")
    plan = quick_plan(recipe, "cpu")
    check_against(recipe, "cpu", 1, plan.exact, print)  # the estimated part may be wrong there
    with pytest.raises(ValueError, match=r"needs at least .* this machine has"):
        check_against(recipe, "cpu", 1, plan.exact - GIB, print)


def test_what_is_proposed_on_a_cpu_fits_with_the_guess_and_moves_nothing_to_the_host() -> None:
    recipe = recipe_of(Options(run=RunOptions(batch_size=4096)), llama_config(SIZES["smollm2-135m"]), "cpu")
    with pytest.raises(ValueError, match="this would fit: ") as refused:
        check_against(recipe, "cpu", 1, 16 * GIB, print)
    words = str(refused.value).split("this would fit: ")[1].split(" (")[0].split()
    changes = dict(zip(words[::2], words[1::2], strict=True))
    assert changes.keys() == {"--remat", "--batch-size", "--accumulation-steps"}
    smaller = dataclasses.replace(
        recipe,
        remat="full",
        batch_size=int(changes["--batch-size"]),
        micro_batches=int(changes["--accumulation-steps"]),
    )
    assert smaller.batch_size * smaller.micro_batches == 4096
    assert quick_plan(smaller, "cpu").peak <= 16 * GIB


def test_the_limit_of_this_machine_is_known() -> None:
    limit = memory_limit()
    assert limit is None or limit > GIB / 8


def test_the_check_is_no_part_of_what_a_run_is() -> None:
    assert record_of(Options()) == record_of(Options(run=RunOptions(memory_check=False)))
