"""The first stage of many runs: each tenant's run is prepared as one of its own, and the base is described once.

A tenant whose data cannot be used is set aside, and one whose run is finished has nothing left to do. Options that
contradict each other, or another base, are errors before any weights are read.
"""

import dataclasses
import logging
from pathlib import Path

import jax

from qlora_jax.adapters.pretrained import Pretrained
from qlora_jax.errors import OptionError, QLoRAError
from qlora_jax.finetune.folder import finished_error, is_finished
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.prepare import PreparedRun, prepare
from qlora_jax.finetune.tenants.options import TenantsFile
from qlora_jax.models import DecoderConfig
from qlora_jax.peft import LoRA
from qlora_jax.peft.bank import Bank

__all__ = ["PreparedTenants", "prepare_tenants"]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedTenants:
    """Everything that training needs, before any weights are read.

    Attributes:
        output: the folder in which each tenant has one of its name.
        pretrained: the base with a bank of `slots` + 1 slots, in which slot 0 is the bare base.
        runs: the run of each tenant, by its name, in the order in which they get a slot.
        failed: why a tenant was set aside, by its name.
        slots: how many tenants train at the same time.
        rows: rows of a micro-batch.
        host_states: whether all tenants train at the same time and take turns in the slots.
    """

    output: Path
    pretrained: Pretrained
    runs: dict[str, PreparedRun]
    failed: dict[str, str]
    slots: int
    rows: int
    host_states: bool = False


def prepare_tenants(file: TenantsFile, *, progress: bool = True) -> PreparedTenants:
    """Check the options of all tenants and open everything that their runs need.

    Raises:
        OptionError: more than one device, a model that is no decoder, another base of one tenant, or nothing left to do.
        QLoRAError: nothing can be trained, with the reason of each tenant.
    """
    if jax.device_count() > 1:
        raise OptionError(f"many tenants: expected one device, found {jax.device_count()}")
    runs: dict[str, PreparedRun] = {}
    failed: dict[str, str] = {}
    finished: list[str] = []
    for name, options in file.tenants.items():
        try:
            runs[name] = prepare(options, progress=progress)
        except (QLoRAError, OSError) as error:
            if _is_finished(options, error):
                finished.append(name)
            else:
                failed[name] = str(error)
                _logger.warning("%s is set aside: %s", name, error)
    if finished:
        _logger.info("Finished before: %s", ", ".join(finished))
    if not runs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items()) or "all tenants are finished"
        raise OptionError(f"nothing to train: {reasons}")
    first = next(iter(runs.values()))
    _check_base(runs, first)
    slots, rows, rank = _sizes(file, runs)
    bank = Bank(slots + 1, rank)
    pretrained = dataclasses.replace(first.pretrained, adapter=None, adapter_metadata=None, subtracted=None, method=bank)
    return PreparedTenants(file.output, pretrained, runs, failed, slots, rows, file.host_states)


def _sizes(file: TenantsFile, runs: dict[str, PreparedRun]) -> tuple[int, int, int]:
    """Return the slots, the rows of a micro-batch and the rank of the bank.

    They are those of all tenants of the file, whether or not a tenant is finished or failed: XLA may add up in another order
    for other shapes, and a tenant that is resumed beside fewer others is to keep its bits.
    """
    of_all = file.tenants.values()
    rows = sorted((options.run.batch_size * options.run.accumulation_steps for options in of_all), reverse=True)
    methods = [options.method() for options in of_all if options.model.adapter is None]
    rank = max(_largest_rank(method) for method in (*methods, *(run.method for run in runs.values())))
    return file.slots, min(file.rows, sum(rows[: file.slots])), rank


def _is_finished(options: Options, error: Exception) -> bool:
    folder = options.run.output
    return is_finished(folder) and str(error) == str(finished_error(folder))


def _largest_rank(method: object) -> int:
    assert isinstance(method, LoRA)  # the options have been checked
    return max([method.rank, *(rank for _, rank in method.rank_pattern)])


def _check_base(runs: dict[str, PreparedRun], first: PreparedRun) -> None:
    """Raise OptionError where runs do not share the base: its files, its storage, its positions and its program."""

    def base(run: PreparedRun) -> object:
        pretrained = run.pretrained
        return (
            str(pretrained.base.path),
            pretrained.quantization,
            pretrained.embedding_storage,
            pretrained.scaling,
            pretrained.dtype,
            pretrained.remat,
            pretrained.checkpoint.model_config,
        )

    if not isinstance(first.pretrained.checkpoint.model_config, DecoderConfig):
        raise OptionError("many tenants: expected a decoder-only model, found an encoder-decoder")
    for name, run in runs.items():
        if base(run) != base(first):
            raise OptionError(f"tenants.{name}: expected the base of the other tenants, found another: {base(run)}")
