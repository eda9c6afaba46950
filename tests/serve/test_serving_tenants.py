"""Many tenants in one batch against each adapter alone, with fewer slots than adapters; about 8 seconds."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_bank import METHODS, adapted, built, spec_of
from test_engine import make, programs_compiled, request, run, tokens
from test_generate import random_prompts

from qlora_jax.adapters.bank import slot_values
from qlora_jax.adapters.bind import adapter_tensors
from qlora_jax.adapters.files import Adapter
from qlora_jax.peft.bank import Bank, write_slot
from qlora_jax.serve import generate
from qlora_jax.serve.adapter_slots import AdapterSlots
from qlora_jax.serve.scheduler import Limits


def engine_of(base: Any, slots: AdapterSlots) -> Any:
    """An engine with a copy of the bank, which belongs to the engine."""
    graph, state = nnx.split(base)
    return make(nnx.merge(graph, jax.tree.map(jnp.copy, state)), LIMITS, adapters=slots)


pytestmark = pytest.mark.integration
LIMITS = Limits(rows=2, capacity=48, chunk=32)


@pytest.fixture(scope="module")
def base() -> Any:
    return built(spec_of("llama", Bank(slots=4, bank_rank=4)))


@pytest.fixture(scope="module")
def models(base: Any) -> dict[str, Any]:
    """Six adapters by name, and the bare base; each as a model of its own."""
    found = {f"a{seed}": adapted("llama", base, METHODS[seed % 3], seed) for seed in range(6)}
    return found | {"": base}


def test_each_answer_is_that_of_its_adapter_alone(base: Any, models: dict[str, Any]) -> None:
    """Three slots for six adapters, of which two are held in memory: they are read again while others run."""
    reads: list[str] = []

    def load(name: str) -> Any:
        reads.append(name)
        single = models[name]
        return slot_values(base, Adapter(name, single.method, None, adapter_tensors(single)))

    slots = AdapterSlots(4, load, held=2)
    for name in models:
        if name:
            slots.register(name, name)
    assert reads == sorted(filter(None, models))
    engine = engine_of(base, slots)
    engine.warm_up()
    before = programs_compiled(), write_slot._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    names, prompts = [*models, "a1", "a0", "a5"], random_prompts((9, 20, 3, 17, 30, 5, 8, 9, 9, 20))
    prompts[8] = prompts[0]  # the same text for two adapters must share nothing
    arrivals = [
        (2 * index, request(prompt, 10, adapter=name, tenant=name))
        for index, (name, prompt) in enumerate(zip(names, prompts, strict=False))
    ]
    events = run(engine, arrivals)
    for name, prompt, own in zip(names, prompts, events, strict=False):
        assert tokens(own) == generate(*nnx.split(models[name]), [prompt], max_new_tokens=10)[0], name
    assert len(reads) > 6
    assert slots.users == 0
    assert (programs_compiled(), write_slot._cache_size()) == before  # pyright: ignore[reportFunctionMemberAccess]
    slots.close()


def test_names_come_and_go(base: Any, models: dict[str, Any]) -> None:
    """A removed name is refused at once; one that comes again is the new adapter, not what a slot or the cache has."""
    values = {
        name: slot_values(base, Adapter(name, one.method, None, adapter_tensors(one)))
        for name, one in models.items()
        if name
    }
    slots = AdapterSlots(4, values.__getitem__)
    engine = engine_of(base, slots)
    (prompt,) = random_prompts((30,))
    for source in ("a1", "a2"):
        slots.register("mine", source)
        (events,) = run(engine, [(0, request(prompt, 6, adapter="mine"))])
        assert tokens(events) == generate(*nnx.split(models[source]), [prompt], max_new_tokens=6)[0]
        slots.remove("mine")
        with pytest.raises(ValueError, match="expected the name of one that is registered, found mine"):
            engine.submit(request(prompt, 6, adapter="mine"))
    slots.register("mine", "a1")
    with pytest.raises(ValueError, match="expected a new name, found mine, which is taken"):
        slots.register("mine", "a2")
    ticket = engine.submit(request(prompt, 6, adapter="mine"))
    slots.remove("mine")  # while it waits
    finished = []
    while engine.busy:
        finished += [event.finish for event in engine.step() if event.ticket == ticket and event.finish]
    assert finished == ["error"]
    slots.close()
