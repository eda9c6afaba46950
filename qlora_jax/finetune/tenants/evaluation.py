"""The held-out metrics of a tenant while many train, as a run of its own measures them."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.finetune.tenants.rounds import padded_rows, row_settings, shared_length
from qlora_jax.finetune.tenants.tenant import Tenant
from qlora_jax.train import TOKENS, mean_metrics
from qlora_jax.train.dpo import PAIRS
from qlora_jax.train.loss import language_model_metrics
from qlora_jax.train.tenant_slots import TenantsState
from qlora_jax.train.tenants import preference_row_losses

__all__ = ["Evaluation"]


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """A tenant's values where `mean_metrics` expects those of a state."""

    adapter: Any


class Evaluation:
    """The programs that measure a tenant; one for each objective and length, which compiles when it is first called."""

    def __init__(self, graphdef: Any, frozen: Any, rows: int) -> None:
        """Make the programs.

        Args:
            graphdef: the graph of the bank's model.
            frozen: the values of the model that do not train.
            rows: rows of a micro-batch.
        """
        self._frozen, self._rows = frozen, rows
        self._sums = {name: jax.jit(partial(sums, graphdef)) for name, sums in _SUMS.items()}

    def __call__(self, tenant: Tenant, state: TenantsState) -> dict[str, float]:
        """Return the held-out metrics of a tenant that is in a slot, as `eval_loss` and so on."""
        objective, held_out = tenant.run.spec.objective.name, tenant.run.objective.held_out
        assert held_out is not None
        rows, length = self._rows, shared_length(tenant.run.objective.length)
        of_rows: dict[str, Any] = {
            name: np.full(rows, value, np.float32) for name, value in row_settings(tenant.run).items()
        }
        of_rows["adapter_ids"] = np.full(rows, tenant.slot, np.int32)
        metrics = mean_metrics(
            lambda parts, frozen, batch: self._sums[objective](*parts, frozen, batch),
            _Evaluated((state.adapter, state.scale)),  # pyright: ignore[reportArgumentType]
            self._frozen,
            held_out(rows),
            put=lambda batch: padded_rows(batch, objective, length, rows) | of_rows,  # pyright: ignore[reportArgumentType]
            progress=False,
        )
        return {f"eval_{name}": value for name, value in metrics.items()}


def _of_tokens(graphdef: Any, adapter: Any, scale: Any, frozen: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return the summed metrics of one held-out micro-batch, and its learned tokens."""
    loss, more = language_model_metrics(nnx.merge(graphdef, adapter, scale, frozen), batch, None)
    return {"loss": loss, **more}, TOKENS.count(batch)


def _of_pairs(graphdef: Any, adapter: Any, scale: Any, frozen: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return the summed metrics of one held-out micro-batch of pairs, and how many of them count."""
    rows = preference_row_losses(nnx.merge(graphdef, adapter, scale, frozen), batch)
    return {name: values.sum() for name, values in rows.items()}, PAIRS.count(batch)


_SUMS = {"sft": _of_tokens, "dpo": _of_pairs}
