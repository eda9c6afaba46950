"""What fits: the largest number that does, and the cheapest options that do, by search over plans.

Memory grows with batch and length, and nearly in a straight line: the line through the last two plans guesses where it meets
the device's memory, so that a few compilations do where halving would take a dozen. The answer has been compiled itself, and
so has the next larger one, which does not fit.
"""

import dataclasses
from collections.abc import Callable, Iterator

from qlora_jax.plan.recipe import Recipe

Peak = Callable[[int], int]

_LINES = 7  # plans after which lines are given up


def largest_that_fits(peak: Peak, limit: int, *, start: int, step: int = 1, most: int = 2**20) -> tuple[int, int] | None:
    """(the largest multiple of `step` whose peak is within the limit, that peak); None where not even `step` fits.

    Args:
        peak: bytes for a number; it never falls as the number grows.
        start: a first guess.
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
    """Strictly between low and high where there is something: where a line through the nearest two plans meets the limit.

    A line that is wrong, as that of a length whose mask grows with its square, costs few plans: nothing is tried that is
    more than four times as large as what was, and after some tries the bracket is halved.
    """
    least, most = low + 1, max(high - 1, low + 1)  # that are still open
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
    return min(max(meets, least), most)  # outside, the line says that it is next to a bound that is known


@dataclasses.dataclass(frozen=True)
class Choice:
    """A set of options, as what it changes of a recipe and of the number of devices.

    Attributes:
        words: the options of scripts/train.py.
        devices: how many times as many devices.
    """

    words: tuple[str, ...]
    recipe: Recipe
    devices: int = 1


def cheaper_first(recipe: Recipe, *, devices: tuple[int, ...] = (1, 2, 4, 8), host: bool = True) -> Iterator[Choice]:
    """Recipes of the same step that take less memory, the ones that cost least first.

    Args:
        devices: how many times as many devices may be proposed.
        host: whether the host's memory is another than the device's.

    remat none → dots → full      recomputes more, a third of the time at most
    remat offload, host offload   a trip of the residuals, or of the optimizer's state, over the bus
    batch size ↔ accumulation     the same rows in more passes
    adamw8bit                     rounds the moments
    host adapter                  a trip of the adapter and its gradient, layer by layer
    more devices
    """
    order = ("none", "dots", "full", *(("offload",) if host or recipe.remat == "offload" else ()))
    start = order.index(recipe.remat)
    for count in devices:
        for words, changed in _states(recipe, host):
            for remat in order[start:]:
                said = () if remat == recipe.remat else (f"--remat {remat}",)
                more = () if count == 1 else (f"{count} times the devices",)
                yield Choice((*said, *words, *more), dataclasses.replace(changed, remat=remat), count)


def _states(recipe: Recipe, host: bool) -> Iterator[tuple[tuple[str, ...], Recipe]]:
    yield (), recipe
    goes = host and not recipe.host_optimizer
    words, less = (("--host-offload",), dataclasses.replace(recipe, host_optimizer=True)) if goes else ((), recipe)
    if goes:
        yield words, less
    batch = recipe.batch_size
    said: tuple[str, ...] = ()  # of the passes
    cuts: list[tuple[tuple[str, ...], Recipe]] = [(said, less)]
    for size in range(batch - 1, 0, -1):
        if batch % size == 0:
            passes = recipe.micro_batches * batch // size
            said = (f"--batch-size {size}", f"--accumulation-steps {passes}")
            less = dataclasses.replace(less, batch_size=size, micro_batches=passes)
            yield (*words, *said), less
            cuts.append((said, less))
    if recipe.optimizer == "adamw":
        yield (*words, *said, "--optimizer adamw8bit"), dataclasses.replace(less, optimizer="adamw8bit")
    if host and not recipe.host_adapter:
        for said, cut in cuts:
            yield ("--host-adapter", *said), dataclasses.replace(cut, host_optimizer=True, host_adapter=True)


def cheapest_that_fits(
    choices: Iterator[Choice], quick: Callable[[Choice], int], peak: Callable[[Choice], int], limit: int
) -> tuple[Choice, int] | None:
    """(the first choice that fits, its peak), with the quick plan saying which are not worth a compilation.

    Args:
        quick: an estimate; a choice whose estimate is more than a tenth above the limit is passed over.
        peak: of the compiled plan, which decides.
    """
    for choice in choices:
        if quick(choice) > 1.1 * limit:
            continue
        found = peak(choice)
        if found <= limit:
            return choice, found
    return None
