"""A run: a base model and a data set in, an adapter out.

    prepare   options      -> PreparedRun   finds everything that can be wrong; no weights are read (prepare.py)
    train     PreparedRun  -> TrainedRun    reads the weights and trains                            (training.py)
    finish    TrainedRun   -> Path          saves, measures and shows what was trained              (finish.py)

    <output>/checkpoints, metrics.jsonl, loss.png    while training
    <output>/best                                    with early stopping: the adapter of the lowest held-out loss
    <output>/adapter                                 in PEFT's format, with a model card
    <output>/model                                   instead, after full fine-tuning
    <output>/eval_results.json                       the metrics of the held-out data

The same options with the same folder resume a run that was stopped. More epochs or steps extend a run that is finished.
"""

import errno
from pathlib import Path

from qlora_jax.errors import CheckpointError, OptionError
from qlora_jax.finetune.finish import finish
from qlora_jax.finetune.folder import claim, saved_work
from qlora_jax.finetune.lock import locked
from qlora_jax.finetune.messages import messages_on_stderr
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.prepare import prepare
from qlora_jax.finetune.training import train
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
        Interrupted: after Ctrl-C or SIGTERM during training, once the step is done and saved.
    """
    if not isinstance(options, Options):
        raise OptionError(f"options: expected Options(…), found {options!r}")
    with messages_on_stderr():
        keep_compiled_programs()
        run = prepare(options, progress=progress)
        with locked(options.run.output):
            claim(options)  # another run may have ended here in the meantime
            try:
                return finish(train(run))
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
                place = error.filename or options.run.output
                raise CheckpointError(f"{place}: cannot be written: {error.strerror}; {saved_work(options)}") from error
