"""What is found in the folder of a run that goes on: whether the data are the same, and whether steps are left."""

import logging

from qlora_jax.errors import OptionError
from qlora_jax.finetune.folder import CHECKPOINTS, finished_error, is_finished, recorded_held_out
from qlora_jax.finetune.lock import remove_abandoned_lock
from qlora_jax.finetune.objectives import Batches
from qlora_jax.finetune.options.options import Options
from qlora_jax.train.state_store import StateStore, latest_step

__all__ = ["find_position"]

_logger = logging.getLogger(__name__)


def find_position(options: Options, batches: Batches, steps: int, held_out_checksum: int) -> int:
    """Move the batches to the position of the newest checkpoint, and return its step; 0 for a run that starts anew.

    Args:
        options: the options of the run, whose folder `claim` has checked.
        batches: the batches to train on.
        steps: the number of steps of the whole run.
        held_out_checksum: the checksum of the held-out examples.

    Raises:
        OptionError: other data than those that the run began with, to train on or held out; no steps left of a finished run;
            more steps done than the run is to have.
        CheckpointError: all checkpoints are damaged.
    """
    folder = options.run.output
    if options.run.overwrite or not folder.exists():
        return 0
    done, finished = latest_step(folder / CHECKPOINTS), is_finished(folder)
    if done is None:
        if finished:
            raise OptionError(
                f"--output {folder}: holds a finished run without its {CHECKPOINTS}, from which it could be extended; "
                "choose another folder, or --overwrite to delete it"
            )
        return 0
    if done > steps:
        raise OptionError(
            f"--output {folder}: holds a run of which {done} steps are done: expected at least as many, found {steps}; "
            "choose another folder, or --overwrite to delete it"
        )
    if finished and done == steps:
        remove_abandoned_lock(folder)
        raise finished_error(folder)
    store = StateStore(folder / CHECKPOINTS, keep=options.run.keep, create=False)
    try:
        position = store.position()
    finally:
        store.close()
    try:
        batches.set_state(position)
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"--output {folder}: holds a run on other data than these ({error}); "
            "choose another folder, or --overwrite to delete it"
        ) from error
    if recorded_held_out(folder) not in (None, held_out_checksum):
        raise OptionError(
            f"--output {folder}: holds a run with other held-out data than {_held_out_place(options)} now has, so that its "
            "held-out losses before and after could not be compared; choose another folder, or --overwrite to delete it"
        )
    if finished:
        _logger.info(
            "Extending the finished run in %s from %d to %d steps; from here on, the learning rate is that of a run of %d.",
            folder,
            done,
            steps,
            steps,
        )
    return done


def _held_out_place(options: Options) -> str:
    data = options.data
    return f"--eval-data {data.eval_data}" if data.eval_data is not None else "the part of --data that is held out"
