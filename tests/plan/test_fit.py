"""The search for what fits, over made-up plans whose answers are known."""

import pytest
from tiny_llama import changed

from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.plan import SIZES, Choice, cheaper_first, cheapest_that_fits, largest_that_fits
from qlora_jax.train import BatchSpec, StepSpec, language_model_objective

SPEC = StepSpec(
    ModelSpec(llama_config(SIZES["smollm2-135m"]), remat="dots"),
    language_model_objective(packed=False),
    BatchSpec(batch_size=4, length=512),
)


@pytest.mark.parametrize("limit", [10, 99, 100, 101, 1000, 12345])
@pytest.mark.parametrize("start", [1, 7, 5000])
@pytest.mark.parametrize("bend", [0, 40])
def test_the_largest_number_is_found_in_few_plans(limit: int, start: int, bend: int) -> None:
    asked: list[int] = []

    def peak(number: int) -> int:
        asked.append(number)
        return 10 + 3 * number + (bend if number > 17 else 0)  # a step, as where another part of the program is the peak

    right = max((number for number in range(5000) if 10 + 3 * number + (bend if number > 17 else 0) <= limit), default=0)
    found = largest_that_fits(peak, limit, start=start)
    assert found == ((right, peak(right)) if right else None)
    assert len(set(asked)) <= 16


@pytest.mark.parametrize("limit", [26_000, 80_000, 10**12])
@pytest.mark.parametrize("start", [1, 4, 100, 2**13])
def test_a_size_that_grows_with_the_square_is_found_in_few_plans(limit: int, start: int) -> None:
    asked: list[int] = []

    def peak(number: int) -> int:
        """A length's: straight while the loss is the peak, then with a mask of its square."""
        asked.append(number)
        return 5_000 + max(300 * number, 10 * number + 8 * number**2)

    found = largest_that_fits(peak, limit, start=start, most=2**20)
    assert found is not None
    number, size = found
    assert size <= limit
    assert peak(number + 1) > limit
    assert len(set(asked)) <= 30


def test_multiples_alone_are_tried() -> None:
    asked: list[int] = []

    def peak(number: int) -> int:
        asked.append(number)
        return number

    assert largest_that_fits(peak, 1000, start=300, step=128) == (896, 896)
    assert all(number % 128 == 0 for number in asked)


def test_options_that_cost_least_come_first() -> None:
    choices = list(cheaper_first(SPEC))
    assert choices[0] == Choice((), SPEC)
    words = [" ".join(choice.words) for choice in choices]
    assert words[1:4] == ["--remat full", "--remat offload", "--host-offload"]
    assert any("--batch-size 2 --accumulation-steps 2" in said for said in words)
    assert any("--optimizer adamw8bit" in said for said in words)
    assert "8 times the devices" in words[-1]
    rows = {choice.spec.batch.batch_size * choice.spec.batch.micro_batches for choice in choices}
    assert rows == {4}  # the step stays the same


def test_without_host_memory_nothing_goes_there() -> None:
    choices = list(cheaper_first(SPEC, devices=(1,), host=False))
    assert len(choices) > 4
    assert not any("host" in word or "offload" in word for choice in choices for word in choice.words)
    assert not any(choice.spec.optimizer.host_optimizer or choice.spec.model.remat == "offload" for choice in choices)


def test_the_cheapest_that_fits_is_compiled_and_what_is_hopeless_is_not() -> None:
    compiled: list[Choice] = []

    def size(choice: Choice) -> int:
        spec = choice.spec
        rest = (50 if spec.model.remat == "dots" else 0) + (0 if spec.optimizer.host_optimizer else 30)
        return 100 * spec.batch.batch_size + rest

    def peak(choice: Choice) -> int:
        compiled.append(choice)
        return size(choice)

    found = cheapest_that_fits(cheaper_first(SPEC), size, peak, 405)
    assert found is not None
    assert found[1] == 400
    assert found[0].spec == changed(SPEC, model={"remat": "full"}, optimizer={"host_optimizer": True})
    assert all(size(choice) <= 1.1 * 405 for choice in compiled)
    assert cheapest_that_fits(cheaper_first(SPEC), size, peak, 50) is None
