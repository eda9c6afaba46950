"""Programs compiled while weights are read: that a run uses them, on one device and on several, and only where they fit.

References: JAX's own log of what was lowered, with the thread that did it; the step that is compiled where it is needed.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.finetune import finetune
from qlora_jax.finetune.data_options import DataOptions
from qlora_jax.finetune.options import ModelOptions, Options, RunOptions
from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.train import (
    Ahead,
    abandoned_on_error,
    adamw,
    compile_ahead,
    compiled_first,
    create_state,
    host_offload,
    jit_train_step,
    language_model_loss,
    split,
)

CONFIG: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TX = adamw(1e-2)


def make(rank: int = 4) -> CausalLM:
    return CausalLM(llama_config(CONFIG), quantization=Quantization(), method=LoRA(rank), remat="none", rngs=nnx.Rngs(0))


def batch_of(rows: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(rows).integers(0, 101, (1, rows, 16), np.int32)
    return {"inputs": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}


def begin(rank: int = 4) -> Ahead:
    ahead = compile_ahead(lambda: nnx.eval_shape(partial(make, rank)), TX, language_model_loss, batch_of(2))
    assert ahead is not None
    return ahead


class Refuses:
    """A step that must not be compiled."""

    def lower(self, *_: Any) -> Any:
        raise AssertionError("compiled once more")


def test_the_program_is_that_of_the_step() -> None:
    """It runs in the step's place, step after step, and gives what the step gives; other shapes get their own program."""
    graphdef, adapter, frozen = split(make())
    other = jax.tree.map(jnp.array, adapter)
    state, plain = create_state(TX, adapter), create_state(TX, other)
    program, evaluation = begin().programs(graphdef)
    assert program is not None
    assert evaluation is None
    reference = jit_train_step(graphdef, TX, language_model_loss, plain)
    step = compiled_first(Refuses(), program)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        state, found = step(state, frozen, batch_of(2))
        plain, expected = reference(plain, frozen, batch_of(2))
        np.testing.assert_array_equal(found["loss"], expected["loss"])
    with pytest.raises(AssertionError, match="compiled once more"):
        step(state, frozen, batch_of(3))
    state, _ = compiled_first(reference, program)(state, frozen, batch_of(3))
    assert int(state.step) == 3


def test_another_model_takes_no_part_of_it() -> None:
    graphdef, *_ = split(nnx.eval_shape(partial(make, 8)))
    ahead = begin(4)
    assert ahead.programs(graphdef) == (None, None)
    ahead.train.result()  # no test leaves a thread behind


def test_where_the_compiler_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's times kernels, for which the device should be idle; state in host memory is placed by its optimizer."""
    arguments = (lambda: nnx.eval_shape(make), language_model_loss, batch_of(2))
    model, loss, batch = arguments
    assert compile_ahead(model, host_offload(TX), loss, batch) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compile_ahead(model, TX, loss, batch) is None


def test_an_error_begins_no_more_programs() -> None:
    hold = threading.Event()

    def model() -> Any:
        hold.wait()
        return nnx.eval_shape(make)

    ahead = compile_ahead(model, TX, language_model_loss, batch_of(2), held_out_loss=language_model_loss)
    assert ahead is not None
    with pytest.raises(ValueError, match="damaged"), abandoned_on_error(ahead):
        raise ValueError("damaged")
    hold.set()
    assert ahead.train.cancelled()
    assert ahead.evaluate is not None
    assert ahead.evaluate.cancelled()


def steps_lowered(options: Options) -> list[tuple[str, bool]]:
    """(name of a step, whether the thread ahead lowered it) of a run, in order."""
    found: list[tuple[str, bool]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            for name in ("jit(train_step)", "jit(step)"):  # the second is the evaluation's
                if text.startswith(f"Compiling {name}"):
                    found.append((name, threading.current_thread().name.startswith("compile")))

    listener = Listener()
    logging.getLogger("jax").addHandler(listener)
    jax.config.update("jax_log_compiles", True)  # of all threads, which `jax.log_compiles` is not
    try:
        finetune(options, progress=False)
    finally:
        jax.config.update("jax_log_compiles", False)
        logging.getLogger("jax").removeHandler(listener)
    return found


def options_of(model: Path, folder: Path) -> Options:
    data = folder / "data.jsonl"
    rows = [{"question": f"{number}?", "answer": "red" * (1 + number % 3)} for number in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Options(
        model=ModelOptions(model=str(model)),
        data=DataOptions(data=str(data), max_length=64, held_out=0.2),
        run=RunOptions(output=folder / "run", max_steps=2, batch_size=1, accumulation_steps=2, samples=0),
    )


def test_a_run_compiles_its_steps_ahead(tiny_llama: Path, tmp_path: Path) -> None:
    assert steps_lowered(options_of(tiny_llama, tmp_path)) == [("jit(step)", True), ("jit(train_step)", True)]


_DEVICES = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import test_ahead
options = test_ahead.options_of(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
print(test_ahead.json.dumps(test_ahead.steps_lowered(options)))
"""


def test_so_does_one_on_several_devices(tiny_llama: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, str(Path(__file__).parent), str(tiny_llama), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [["jit(step)", True], ["jit(train_step)", True]]
