"""Programs compiled while weights are read: that a run uses them, on one device and on several, and only where they fit.

References: JAX's own log of what was lowered, with the thread that did it; the step that is compiled where it is needed.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowered import BOTH_PRECOMPILED, steps_lowered
from tiny_config import CONFIG
from virtual_devices import virtual_devices

from qlora_jax.finetune import LoRAOptions, ModelOptions, Options, RunOptions, finetune
from qlora_jax.finetune.options.data import DataOptions
from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.train import (
    BatchSpec,
    OptimizerSpec,
    Precompiled,
    StepSpec,
    adamw,
    compile_before_run,
    create_state,
    jit_train_step,
    language_model_loss,
    language_model_objective,
    learning_rate_schedule,
    precompile,
    split,
)

RATE = learning_rate_schedule("constant", 1e-2, 10)
TX = adamw(RATE)


def spec_of(rank: int = 4, *, host_optimizer: bool = False) -> StepSpec[ModelSpec]:
    model = ModelSpec(llama_config(CONFIG | {"model_type": "llama"}), method=LoRA(rank), dtype="float32", remat="none")
    optimizer = OptimizerSpec(host_optimizer=host_optimizer)
    return StepSpec(model, language_model_objective(packed=False), BatchSpec(batch_size=2, length=16), optimizer)


def make(rank: int = 4) -> Any:
    return spec_of(rank).model.build(nnx.Rngs(0))


def batch_of(rows: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(rows).integers(0, 101, (1, rows, 16), np.int32)
    return {"inputs": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}


def begin(rank: int = 4) -> Precompiled:
    return precompile(spec_of(rank), RATE)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("compile"):
            thread.join()


class Refuses:
    """A step that must not be compiled."""

    def lower(self, *_: Any) -> Any:
        raise AssertionError("compiled once more")


def test_the_program_is_that_of_the_step() -> None:
    """It runs in the step's place, step after step, and gives what the step gives; other shapes need another."""
    graphdef, adapter, frozen = split(make())
    other = jax.tree.map(jnp.array, adapter)
    state, plain = create_state(TX, adapter), create_state(TX, other)
    program, evaluation = begin().programs(graphdef)
    assert program is not None
    assert evaluation is None
    reference = jit_train_step(graphdef, TX, language_model_loss, plain)
    step = compile_before_run(Refuses(), program)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        state, found = step(state, frozen, batch_of(2))
        plain, expected = reference(plain, frozen, batch_of(2))
        np.testing.assert_array_equal(found["loss"], expected["loss"])
    with pytest.raises(AssertionError, match="compiled once more"):
        step(state, frozen, batch_of(3))


def test_it_is_used_where_its_arguments_lie() -> None:
    graphdef, adapter, frozen = split(make())
    program, _ = begin().programs(graphdef)
    state = create_state(TX, adapter)
    away = jax.device_put(frozen, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
    with pytest.raises(AssertionError, match="compiled once more"):
        compile_before_run(Refuses(), program)(state, away, batch_of(2))  # pyright: ignore[reportArgumentType]
    compile_before_run(Refuses(), program)(state, frozen, batch_of(2))  # pyright: ignore[reportArgumentType]


def test_another_model_takes_no_part_of_it() -> None:
    graphdef, *_ = split(nnx.eval_shape(lambda: make(8)))
    assert begin(4).programs(graphdef) == (None, None)


def test_where_the_compiler_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's times kernels, for which the device should be idle; state in host memory is placed by its optimizer."""
    assert precompile(spec_of(host_optimizer=True), RATE) == Precompiled()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert precompile(spec_of(), RATE) == Precompiled()


class Recorded:
    """A step that says when it is compiled."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def lower(self, *_: Any) -> "Recorded":
        return self

    def compile(self) -> None:
        self.order.append(self.name)


@pytest.mark.parametrize("evaluate_first", [True, False])
def test_what_is_needed_first_comes_first(monkeypatch: pytest.MonkeyPatch, evaluate_first: bool) -> None:
    order: list[str] = []
    for name in ("train", "eval"):
        monkeypatch.setattr(f"qlora_jax.train.spec.jit_{name}_step", lambda *_, name=name, **__: Recorded(name, order))
    programs = precompile(spec_of(), RATE, evaluate=True, evaluate_first=evaluate_first)
    for future in (programs.train, programs.evaluate):
        assert future is not None
        future.result()
    assert order == (["eval", "train"] if evaluate_first else ["train", "eval"])


def test_closed_it_begins_no_more_programs() -> None:
    hold = threading.Event()

    class Waiting:
        residuals_on_host = False

        def abstract(self, platform: str | None = None) -> Any:
            hold.wait(60)
            return nnx.eval_shape(make)

    programs = precompile(StepSpec(Waiting(), language_model_objective()), RATE, evaluate=True)
    programs.close()
    hold.set()
    for future in (programs.train, programs.evaluate):
        assert future is not None
        assert future.cancelled()


def options_of(model: Path, folder: Path, *, dora: bool = False) -> Options:
    data = folder / "data.jsonl"
    rows = [{"question": f"{number}?", "answer": "red" * (1 + number % 3)} for number in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Options(
        model=ModelOptions(model=str(model)),
        lora=LoRAOptions(use_dora=dora),
        data=DataOptions(data=str(data), max_length=64, held_out=0.2),
        run=RunOptions(output=folder / "run", max_steps=2, batch_size=1, accumulation_steps=2, samples=0),
    )


@pytest.mark.integration
def test_a_run_precompiles_its_steps(tiny_llama: Path, tmp_path: Path) -> None:
    with steps_lowered() as found:
        finetune(options_of(tiny_llama, tmp_path), progress=False)
    assert found == BOTH_PRECOMPILED


_DEVICES = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import lowered, test_precompile
with lowered.steps_lowered() as found:
    options = test_precompile.options_of(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), dora=True)
    test_precompile.finetune(options, progress=False)
print(json.dumps(found))
"""


@pytest.mark.integration
def test_so_does_one_on_several_devices(tiny_llama: Path, tmp_path: Path) -> None:
    """With DoRA, whose constants lie whole on each device."""
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, str(Path(__file__).parent), str(tiny_llama), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=virtual_devices(4),
    )
    assert done.returncode == 0, done.stderr
    assert [tuple(step) for step in json.loads(done.stdout.splitlines()[-1])] == BOTH_PRECOMPILED
