"""The options of a run: its length, its evaluations and its folder."""

import dataclasses
from pathlib import Path

from qlora_jax.checkpoint.whole_folder import check_local
from qlora_jax.errors import OptionError
from qlora_jax.nn import MeshShape, shape_on

MOST_EPOCHS = 100_000  # each is shuffled, and packed, to count the steps of a run


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The length of the run, its evaluations and its folder."""

    output: Path = Path("runs/plain-answers")
    """Folder of the run, on this machine or mounted there."""
    overwrite: bool = False
    """Delete the run that the folder holds."""
    epochs: float = 2.0
    """Passes over the training data, such as 3 or 0.5, unless max-steps is given. More of them extend a finished run."""
    max_steps: int | None = None
    """Number of steps of the run, instead of epochs, in as many passes as they take. More of them extend a finished run."""
    batch_size: int = 2
    """Rows of one micro-batch on each device; the devices of a tensor axis share them."""
    accumulation_steps: int = 1
    """Number of micro-batches whose gradients are averaged in one step."""
    seed: int = 0
    """Random seed of the adapter's initial values, the order of the data and dropout."""
    eval_every: int = 20
    """Steps between evaluations; 0: evaluate only before and after training."""
    predict_with_generate: bool = False
    """Measure RougeL of an encoder-decoder at every evaluation, not only after training."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations without a lower held-out loss, and save the adapter of the lowest; 0: never stop."""
    mesh: str | None = None
    """Number of devices along each axis, such as data=2,fsdp=2,tensor=2; all devices along fsdp if not given."""
    save_every: int = 20
    """Steps between checkpoints; 0: only after the last step."""
    keep: int = 3
    """Number of checkpoints to keep."""
    memory_check: bool = True
    """Stop before anything is loaded where the run needs more memory than the devices have."""
    samples: int = 3
    """Number of held-out prompts whose answers before and after training are shown; 0 for none."""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "accumulation_steps": 1, "keep": 1}
        least |= dict.fromkeys(("seed", "eval_every", "early_stopping_patience", "save_every", "samples"), 0)
        low = [
            f"{name}: expected at least {bound}, found {getattr(self, name)}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if not 0 < self.epochs <= MOST_EPOCHS:
            low.append(f"epochs: expected a number above 0 and at most {MOST_EPOCHS:,}, found {self.epochs:g}")
        if self.max_steps is not None and self.max_steps < 1:
            low.append(f"max_steps: expected at least 1, found {self.max_steps}")
        if self.early_stopping_patience and self.eval_every == 0:
            low.append("early_stopping_patience: expected eval_every of at least 1, found 0")
        if low:
            raise OptionError("; ".join(low))
        check_local("output", self.output)
        _ = self.mesh_shape

    @property
    def mesh_shape(self) -> MeshShape | None:
        """The shape of the mesh; None if all devices are along `fsdp`."""
        return None if self.mesh is None else MeshShape.parse(self.mesh)

    def micro_batch_rows(self, devices: int) -> int:
        """Return the rows of one micro-batch on so many devices."""
        return self.batch_size * shape_on(self.mesh_shape, devices).row_shards

    def rows_of_step(self, devices: int) -> int:
        """Return the rows of one step on so many devices."""
        return self.accumulation_steps * self.micro_batch_rows(devices)
