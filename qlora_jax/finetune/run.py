"""A run: a base model and a data set in, an adapter out.

    prepare   options      -> PreparedRun   finds everything that can be wrong; no weights are read (prepare.py)
    train     PreparedRun  -> TrainedRun    reads the weights and trains                            (training.py)
    finish    TrainedRun   -> Path          saves, measures and shows what was trained              (finish.py)

    <output>/checkpoints, metrics.jsonl, loss.png    while training
    <output>/best                                    with early stopping: the adapter of the lowest held-out loss
    <output>/adapter                                 in PEFT's format, with a model card
    <output>/model                                   instead, after full fine-tuning
    <output>/eval_results.json                       the metrics of the held-out data

Of several processes (`cluster.py`), each runs all three stages and trains on its own devices. Process 0 alone touches the
output folder; the others get from it what they need to know.

The same options with the same folder resume a run that was stopped. More epochs or steps extend a run that is finished.
"""

import errno
import json
from contextlib import ExitStack
from pathlib import Path

from qlora_jax.cluster import join
from qlora_jax.errors import CheckpointError, HostError, OptionError, QLoRAError
from qlora_jax.finetune.finish import finish
from qlora_jax.finetune.folder import claim, record_of, saved_work
from qlora_jax.finetune.lock import locked
from qlora_jax.finetune.messages import messages_on_stderr
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.prepare import PreparedRun, prepare
from qlora_jax.finetune.training import train
from qlora_jax.nn import check_same, is_main, of_main, several, together
from qlora_jax.train import keep_compiled_programs

__all__ = ["finetune"]

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # a full or broken disk


def finetune(options: Options, *, progress: bool = True) -> Path:
    """Run all three stages and return the folder of the adapter, or of the model after full fine-tuning.

    Args:
        options: what to train on what.
        progress: whether to show progress bars.

    Raises:
        QLoRAError: options, data or files that cannot be used, before any long work; or a loss that diverged.
        OSError: files that cannot be read, or a folder that cannot be written.
        HostError: another process of the run has failed, or ended.
        Interrupted: after Ctrl-C or SIGTERM during training, once the step is done and saved.
    """
    if not isinstance(options, Options):
        raise OptionError(f"options: expected Options(…), found {options!r}")
    join(options.hosts)
    with messages_on_stderr():
        keep_compiled_programs()
        if not several():
            run = prepare(options, progress=progress)
            with locked(options.run.output):
                claim(options)  # another run may have ended here in the meantime
                return _train_and_finish(run)
        try:
            return _in_several_processes(options, progress=progress and is_main())
        except (RuntimeError, ValueError) as error:
            if isinstance(error, QLoRAError):
                raise
            text = " ".join(str(error).split())[:300]  # of XLA, whose collectives find that the other end is closed
            raise HostError(f"a computation of all processes failed, as it does when one of them ends: {text}") from error


def _in_several_processes(options: Options, *, progress: bool) -> Path:
    """Run the stages in one of several processes. What goes wrong in one of them before training is an error in all."""
    check_same("options", json.dumps(record_of(options), sort_keys=True))
    with together():
        run = prepare(options, progress=progress)
    position = of_main(run.batches.get_state)
    with together():
        run.batches.set_state(position)  # raises where a process has read other data
    with ExitStack() as locks:
        with together():
            if is_main():
                locks.enter_context(locked(options.run.output))
                claim(options)  # another run may have ended here in the meantime
        return _train_and_finish(run)


def _train_and_finish(run: PreparedRun) -> Path:
    try:
        return finish(train(run))
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        options = run.options
        place = error.filename or options.run.output
        raise CheckpointError(f"{place}: cannot be written: {error.strerror}; {saved_work(options)}") from error
