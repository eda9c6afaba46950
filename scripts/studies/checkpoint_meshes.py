"""Save a run on one mesh and restore it on another: are the leaves equal, bit for bit, and is the next loss the same?

    python -m scripts.studies.checkpoint_meshes                            8 virtual devices of a CPU, a small Llama
    python -m scripts.studies.checkpoint_meshes --cases adamw8bit dpo --moves "fsdp=8>1" "data=8>data=2,tensor=4"

Method. The model of `scripts.studies.meshes` is loaded on a mesh and trained for two steps, and a checkpoint is saved as a
run saves it. On another mesh, the model is loaded and the state is created anew, and the checkpoint is restored into it.
Reported are, for each case (an optimizer, with or without a state or an adapter in host memory, or DPO) and each move:

    equal       whether every leaf has the bytes that were saved, and the sharding and the memory of the mesh that restores
    loss        the relative difference of the loss of the next step, on the mesh that restores, from that on the other mesh

"1" is one device. The last line is JSON. The exit code is 1 if a leaf differs, or a loss by more than 1e-5.
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from qlora_jax import cli
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import OptionError
from qlora_jax.nn import MeshShape, data_mesh, mesh_context, put_rows
from qlora_jax.peft import LoRA
from qlora_jax.train import (
    StepObjective,
    TrainState,
    create_state,
    dpo_objective,
    host_offload,
    jit_train_step,
    language_model_objective,
    optimizer,
    split,
)
from qlora_jax.train.state_store import StateStore
from scripts.studies.meshes import DEVICES, batch_of, write_checkpoint

ONE = "1"
MOVES = (
    *("fsdp=8>1", "1>fsdp=8", "data=2,tensor=4>fsdp=8", "fsdp=8>data=2,tensor=4", "data=8>data=2,tensor=4"),
    "data=2,fsdp=2,tensor=2>1",
)
CASES: dict[str, tuple[Any, StepObjective]] = {
    "adamw": (optimizer("adamw", 1e-3), language_model_objective()),
    "adamw8bit": (optimizer("adamw8bit", 1e-3), language_model_objective()),
    "lion": (optimizer("lion", 1e-4), language_model_objective()),
    "adafactor": (optimizer("adafactor", 1e-3), language_model_objective()),
    "offload": (host_offload(optimizer("adamw", 1e-3)), language_model_objective()),
    "offload8bit": (host_offload(optimizer("adamw8bit", 1e-3), adapter=True), language_model_objective()),
    "dpo": (optimizer("adamw", 1e-6), dpo_objective()),
}
STEPS = 2


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """What to save and restore."""

    cases: tuple[str, ...] = tuple(CASES)
    """Optimizers and objectives."""
    moves: tuple[str, ...] = MOVES
    """Pairs of meshes, FROM>TO, of 8 devices each, or 1."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.cases) - set(CASES)):
            raise OptionError(f"cases: expected some of {', '.join(CASES)}, found {', '.join(unknown)}")
        if wrong := [move for move in self.moves if move.count(">") != 1]:
            raise OptionError(f"moves: expected FROM>TO, found {', '.join(wrong)}")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the program."""

    run: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)


class Run:
    """The model, the step and the state of a case on a mesh."""

    def __init__(self, folder: Path, case: str, mesh_text: str) -> None:
        self.mesh = None if mesh_text == ONE else data_mesh(MeshShape.parse(mesh_text))
        tx, objective = CASES[case]
        with mesh_context(self.mesh):
            model = load_model(
                open_checkpoint(str(folder)), method=LoRA(rank=4), dtype="float32", mesh=self.mesh, progress=False
            )
            graph, adapter, self.frozen = split(model)
            self.state = create_state(tx, adapter)
            self._step = jit_train_step(graph, tx, objective.loss, self.state, unit=objective.unit)
        self._is_dpo = objective.name == "dpo"

    def step(self, state: TrainState, number: int) -> tuple[TrainState, float]:
        """Return (state after a step, loss of the step)."""
        with mesh_context(self.mesh):
            state, metrics = self._step(state, self.frozen, put_rows(self.mesh, self._batch(number), 1))
            return state, float(metrics["loss"])

    def _batch(self, number: int) -> dict[str, Array]:
        if not self._is_dpo:
            return batch_of("llama", number)
        names = ("inputs", "targets", "loss_mask")
        sides = {"chosen": batch_of("llama", 2 * number), "rejected": batch_of("llama", 2 * number + 1)}
        return {f"{side}_{name}": batch[name] for side, batch in sides.items() for name in names}


def move(folder: Path, runs: tuple[Run, Run]) -> tuple[bool, float]:
    """Return (whether the restored leaves are the saved ones, relative difference of the next loss)."""
    one, other = runs
    state = jax.tree.map(lambda leaf: jax.device_put(np.array(leaf), leaf.sharding), one.state)  # a step donates its own
    for number in range(STEPS):
        state, _ = one.step(state, number)
    like = other.state
    writer, reader = StateStore(folder, keep=1), None
    try:
        writer.save(STEPS, state, {})
        writer.wait()
        reader = StateStore(folder, keep=1, create=False)
        restored, _ = reader.restore(like)
    finally:
        for store in (writer, reader):
            if store is not None:
                store.close()
    pairs = zip(*(jax.tree.leaves(tree) for tree in (state, restored, like)), strict=True)
    equal = all(
        saved.dtype == found.dtype
        and np.array(saved).tobytes() == np.array(found).tobytes()
        and found.sharding == own.sharding
        for saved, found, own in pairs
    )
    (_, expected), (_, loss) = one.step(state, STEPS), other.step(restored, STEPS)
    return equal, abs(loss / expected - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return its exit code."""
    return cli.run(compare, Options, __doc__, arguments)


def compare(options: Options) -> int:
    """Print what each move of each case keeps."""
    found: dict[str, dict[str, Any]] = {}
    right = True
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder) / "model", "llama")
        for case in options.run.cases:
            runs: dict[str, Run] = {}
            for number, text in enumerate(options.run.moves):
                for name in (names := text.split(">")):
                    if name not in runs:
                        runs[name] = Run(model, case, name)
                equal, loss = move(Path(folder) / f"{case}-{number}", (runs[names[0]], runs[names[1]]))
                found.setdefault(case, {})[text] = {"equal": equal, "loss": loss}
                right &= equal and loss <= 1e-5
                print(f"{case:12} {text:32} equal {equal}  loss {loss:.1e}", flush=True)
    print(json.dumps(found))
    return 0 if right else 1


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main())
