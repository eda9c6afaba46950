"""Many runs over one base: a file of tenants in, an adapter of each out.

    prepare   TenantsFile      -> PreparedTenants   finds everything that can be wrong; no weights are read (prepare.py)
    train     PreparedTenants  -> list[Tenant]      reads the base once, trains and finishes each tenant    (training.py)

    <output>/NAME    the folder of a run of its own: checkpoints, metrics.jsonl, loss.png, adapter, eval_results.json

The same command resumes every tenant that is not finished, from its own last checkpoint.
"""

import logging

from qlora_jax.errors import CheckpointError, OptionError
from qlora_jax.finetune.messages import messages_on_stderr
from qlora_jax.finetune.tenants.options import ManyOptions
from qlora_jax.finetune.tenants.prepare import prepare_tenants
from qlora_jax.finetune.tenants.training import train_tenants

__all__ = ["train_many"]

_logger = logging.getLogger(__name__)


def train_many(options: ManyOptions, *, progress: bool = True) -> int:
    """Train all tenants of a file; return how many have an adapter now.

    Args:
        options: which file.
        progress: whether to show the table.

    Raises:
        QLoRAError: options that cannot be used, before any long work; or tenants that were set aside, after all others have
            finished.
        Interrupted: after Ctrl-C or SIGTERM, once the round is done and saved.
    """
    if not isinstance(options, ManyOptions):
        raise OptionError(f"options: expected ManyOptions(…), found {options!r}")
    with messages_on_stderr():
        file = options.read()
        prepared = prepare_tenants(file, progress=False)
        tenants = train_tenants(prepared, progress=progress)
    failed = prepared.failed | {tenant.name: tenant.reason for tenant in tenants if tenant.status == "set aside"}
    if failed:
        raise CheckpointError.of(
            f"{len(failed)} of {len(file.tenants)} tenants are set aside",
            [f"{name}: {reason}" for name, reason in failed.items()],
        )
    if paused := [tenant.name for tenant in tenants if tenant.status == "paused"]:
        _logger.info(
            "Paused: %s. The same command goes on without the file pause in the tenant's folder.", ", ".join(paused)
        )
    return sum(tenant.status == "finished" for tenant in tenants)
