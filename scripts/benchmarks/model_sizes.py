"""Models by the name of their size, for programs that compile without weights."""

from collections.abc import Iterable

from qlora_jax.errors import OptionError
from qlora_jax.models import ModelConfig, family_of
from qlora_jax.plan import SIZES


def check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise OptionError for the first name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise OptionError(f"{option}: expected some of {', '.join(known)}, found {name}")


def config_of(size: str) -> ModelConfig:
    """Return the config of a model by the name of its size."""
    return family_of(SIZES[size]).config(SIZES[size])
