"""What a test computes, as one program.

Outside `jax.jit` each operation is compiled by itself, which takes most of such a test's time.
"""

from collections.abc import Callable
from typing import Any

import jax


def value_and_pullback(
    function: Callable[..., jax.Array], arguments: tuple[Any, ...], back: Callable[[Any], Any], *others: Any
) -> Any:
    """Return function(*arguments, *others), and what `back` of it is pulled back to for each of the arguments."""

    @jax.jit
    def run(arguments: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        value, pull = jax.vjp(lambda *arguments: function(*arguments, *others), *arguments)
        return value, pull(back(value))

    return run(arguments, others)
