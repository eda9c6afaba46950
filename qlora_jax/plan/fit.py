"""Search over plans for what fits a device: the largest batch or length, or the cheapest options.

Memory grows with batch and length nearly in a straight line. The next guess is where the line through the last two plans
meets the device's memory, so that a few compilations suffice where bisection would take a dozen. Both the answer and the
next larger number, which does not fit, have been compiled.
"""

import dataclasses
from collections.abc import Callable, Iterator

from qlora_jax.models import ModelSpec
from qlora_jax.train.spec import StepSpec

Peak = Callable[[int], int]

_LINES = 7  # the number of plans after which bisection replaces lines


def largest_that_fits(peak: Peak, limit: int, *, start: int, step: int = 1, most: int = 2**20) -> tuple[int, int] | None:
    """Return (the largest multiple of `step` whose peak is within the limit, that peak); None if not even `step` fits.

    Args:
        peak: returns the bytes for a number, which never fall as the number grows.
        limit: the bytes that there are.
        start: the first guess.
        step: the step between numbers.
        most: the largest number to try.
    """
    known: dict[int, int] = {}

    def fits(units: int) -> bool:
        if units not in known:
            known[units] = peak(units * step)
        return known[units] <= limit

    low, high = 0, most // step + 1  # low fits (0 by convention), high does not
    guess = min(max(start // step, 1), high - 1)
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        guess = _guess(known, limit, low, high)
    return (low * step, known[low]) if low else None


def _guess(known: dict[int, int], limit: int, low: int, high: int) -> int:
    """Return the next number to try, between low and high: where the line through the nearest two plans meets the limit.

    A wrong line, such as that of a length whose mask grows with its square, costs few plans: no number is more than four
        times as large as the largest one before, and after some tries the search bisects.
    """
    least, most = low + 1, max(high - 1, low + 1)
    if high not in known:
        most = min(most, max(4 * max(known), least))
    if len(known) == 1:
        (only,) = known
        return min(max(2 * only if low == only else only // 2, least), most)
    if len(known) >= _LINES and high in known:
        return min(max((low + high) // 2, least), most)
    near = sorted(sorted(known, key=lambda units: abs(known[units] - limit))[:2])
    slope = (known[near[1]] - known[near[0]]) / (near[1] - near[0])
    meets = int(near[0] + (limit - known[near[0]]) / slope) if slope > 0 else (low + high) // 2
    return min(max(meets, least), most)  # a line that leads outside means a number next to a known bound


@dataclasses.dataclass(frozen=True)
class Choice:
    """A set of options, and the step that they describe.

    Attributes:
        words: the options of scripts/train.py.
        spec: the step with these options.
        devices: the factor on the number of devices.
    """

    words: tuple[str, ...]
    spec: StepSpec[ModelSpec]
    devices: int = 1


def cheaper_first(
    spec: StepSpec[ModelSpec], *, devices: tuple[int, ...] = (1, 2, 4, 8), host: bool = True
) -> Iterator[Choice]:
    """Yield ways to run the same step with less memory, those that cost the least time first.

    Args:
        spec: the step.
        devices: the factors on the number of devices that may be proposed.
        host: whether host memory is separate from the device's memory.

    remat none → dots → full      recomputes more, a third of the time at most
    remat offload, host offload   moves the saved residuals, or the optimizer's state, over the bus
    batch size ↔ accumulation     runs the same rows in more passes
    adamw8bit                     rounds the moments
    host adapter                  moves the adapter and its gradient over the bus, layer by layer
    more devices
    """
    order = ("none", "dots", "full", *(("offload",) if host or spec.model.remat == "offload" else ()))
    start = order.index(spec.model.remat)
    for count in devices:
        for words, changed in _states(spec, host):
            for remat in order[start:]:
                first = () if remat == spec.model.remat else (f"--remat {remat}",)
                more = () if count == 1 else (f"{count} times the devices",)
                model = dataclasses.replace(changed.model, remat=remat)
                yield Choice((*first, *words, *more), dataclasses.replace(changed, model=model), count)


def with_host_memory(spec: StepSpec[ModelSpec], *, optimizer: bool, adapter: bool) -> StepSpec[ModelSpec]:
    """Return the step with the optimizer's state, and with the adapter, in host memory or not."""
    placed = dataclasses.replace(spec.optimizer, host_optimizer=optimizer, host_adapter=adapter)
    return dataclasses.replace(spec, optimizer=placed)


def _states(spec: StepSpec[ModelSpec], host: bool) -> Iterator[tuple[tuple[str, ...], StepSpec[ModelSpec]]]:
    """Yield (options, step) for each choice of batch, accumulation and optimizer, those that cost the least first."""
    yield (), spec
    words: tuple[str, ...] = ()
    less = spec
    if host and not spec.optimizer.host_optimizer:
        words, less = ("--host-offload",), with_host_memory(spec, optimizer=True, adapter=False)
        yield words, less
    cut: tuple[str, ...] = ()  # the options that cut the batch
    cuts: list[tuple[tuple[str, ...], StepSpec[ModelSpec]]] = [(cut, less)]
    rows = spec.batch.batch_size
    for size in range(rows - 1, 0, -1):
        if rows % size == 0:
            passes = spec.batch.micro_batches * rows // size
            cut = (f"--batch-size {size}", f"--accumulation-steps {passes}")
            batch = dataclasses.replace(less.batch, batch_size=size, micro_batches=passes)
            less = dataclasses.replace(less, batch=batch)
            yield (*words, *cut), less
            cuts.append((cut, less))
    if spec.optimizer.name == "adamw":
        rounded = dataclasses.replace(less.optimizer, name="adamw8bit")
        yield (*words, *cut, "--optimizer adamw8bit"), dataclasses.replace(less, optimizer=rounded)
    if host and not spec.optimizer.host_adapter:
        for cut, less in cuts:
            yield ("--host-adapter", *cut), with_host_memory(less, optimizer=True, adapter=True)


def cheapest_that_fits(
    choices: Iterator[Choice], quick: Callable[[Choice], int], peak: Callable[[Choice], int], limit: int
) -> tuple[Choice, int] | None:
    """Return (the first choice that fits, its peak); None if none fits. The quick plan decides which choices are compiled.

    Args:
        choices: the choices, in order.
        quick: returns an estimate of the peak; a choice whose estimate is more than a tenth above the limit is skipped.
        peak: returns the peak of the compiled plan, which decides.
        limit: the bytes that there are.
    """
    for choice in choices:
        if quick(choice) > 1.1 * limit:
            continue
        found = peak(choice)
        if found <= limit:
            return choice, found
    return None
