"""What the slots of adapters hold in main memory, without a model; less than a CPU-second."""

import pytest

from qlora_jax.errors import CheckpointError
from qlora_jax.serve.adapter_slots import AdapterSlots


def test_what_was_read_for_answers_that_have_gone_is_not_held_beyond_the_limit() -> None:
    slots = AdapterSlots(3, lambda source: f"values of {source}", held=2)
    names = list("abcdefgh")
    for name in names:
        slots.register(name, name)
    for name in names[:6]:  # each asks once, and never again
        assert slots.acquire(name) is None
        for future in slots._loading.values():
            future.result(60)
        assert len(slots._loading) == 1
        assert len(slots._held) <= 2
    assert slots.acquire("f") == (1, 6)
    assert not slots._loading
    assert slots.users == 1
    slots.close()


def test_an_adapter_that_cannot_be_read_again_is_asked_for_again_later() -> None:
    broken: set[str] = set()

    def load(source: str) -> str:
        if source in broken:
            raise CheckpointError(f"{source} is damaged")
        return source

    slots = AdapterSlots(2, load, held=1)
    for name in ("a", "b"):
        slots.register(name, name)
    broken.add("a")
    assert slots.ready("b")
    assert slots.ready("nobody")  # `acquire` raises at once
    for ask in (slots.ready, slots.acquire):
        ask("a")  # starts to read it
        with pytest.raises(CheckpointError):
            slots._loading["a", 1].result(60)
        assert slots.ready("a")
        with pytest.raises(CheckpointError, match="a is damaged"):
            slots.acquire("a")
    assert slots.users == 0
    assert slots.acquire("b") == (1, 2)
    slots.close()
