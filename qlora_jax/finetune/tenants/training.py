"""The second and third stage of many runs: the base is read once, and the tenants train together, round by round.

    while a tenant has steps left:
        free slots go to the tenants that wait, in their order
        one step of every tenant in a slot                        rounds.py, train.tenants
        for each tenant: its record, evaluation and checkpoint when they are due, as a run of its own has them
        a tenant at its last step is finished as a run of its own, and its slot is free
        a tenant that failed is set aside, and its slot is free

Every tenant in a slot does one step a round, so that none is held up by another. What one tenant's files or data raise is
that tenant's alone.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.adapters.bank import slot_values
from qlora_jax.adapters.tenants import initial_adapter, model_of_slot
from qlora_jax.errors import QLoRAError
from qlora_jax.finetune.finish import finish
from qlora_jax.finetune.tenants.prepare import PreparedTenants
from qlora_jax.finetune.tenants.rounds import Share, micro_batches, padded_rows
from qlora_jax.finetune.tenants.table import Table
from qlora_jax.finetune.tenants.tenant import Tenant, open_tenant
from qlora_jax.finetune.training import TrainedRun
from qlora_jax.interrupts import Interrupted, deferred
from qlora_jax.models import Model
from qlora_jax.peft.bank import SlotScale
from qlora_jax.train import TOKENS, mean_metrics, split
from qlora_jax.train.dpo import PAIRS
from qlora_jax.train.loss import language_model_metrics
from qlora_jax.train.tenants import (
    METRICS,
    TenantPrograms,
    TenantsState,
    get_slot,
    init_tenants,
    new_slot,
    preference_row_losses,
    put_slot,
    slot_settings,
    split_tenants,
    tenant_programs,
)

__all__ = ["train_tenants"]

_logger = logging.getLogger(__name__)
_OF_A_TENANT = (QLoRAError, OSError, ValueError)  # what a tenant's data and files raise


def train_tenants(prepared: PreparedTenants, *, progress: bool = True) -> list[Tenant]:
    """Read the base, train all tenants and finish each as a run of its own; return them, set aside or finished.

    Raises:
        CheckpointError: weights of the base that are NaN or infinite.
        Interrupted: after Ctrl-C or SIGTERM, once the round is done and every tenant is saved.
    """
    model, _ = prepared.pretrained.load_base(progress=progress)
    with ExitStack() as files:
        tenants = _Tenants(prepared, model)
        del model
        for name, run in prepared.runs.items():
            own = files.enter_context(ExitStack())
            try:
                tenants.all.append(open_tenant(name, run, own))
            except _OF_A_TENANT as error:
                prepared.failed[name] = str(error)
                _logger.warning("%s is set aside: %s", name, error)
        tenants.run(Table(progress=progress))
        return tenants.all


class _Tenants:
    """The tenants, the state of the slots, and the programs: what the loop changes."""

    def __init__(self, prepared: PreparedTenants, model: Model) -> None:
        self.prepared = prepared
        self.all: list[Tenant] = []
        self.abstract = prepared.pretrained.abstract
        graphdef, adapter, scale, self.frozen = split_tenants(model)
        # Committed to its device, as what the programs return is; otherwise each would be compiled once more.
        state = jax.jit(init_tenants, donate_argnums=(0, 1))(adapter, scale)
        self.state: TenantsState = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
        self.programs: TenantPrograms = tenant_programs(graphdef)
        self.evaluate = {name: jax.jit(partial(sums, graphdef)) for name, sums in _SUMS.items()}

    def run(self, table: Table) -> None:
        """Train until every tenant is finished or set aside."""
        with deferred("this round is finished and saved first; once more stops at once") as signals:
            while True:
                self._fill_slots()
                training = [tenant for tenant in self.all if tenant.status == "training"]
                if not training:
                    break
                self._round(training)
                table.show(self.all)
                if signals.number is not None:
                    self._save_all()
                    break
        table.show(self.all, now=True)
        if signals.number is not None:
            raise Interrupted("stopped after a round, which is saved for every tenant", signals.number)

    def _fill_slots(self) -> None:
        """Give the free slots to tenants that wait."""
        for tenant in self.all:
            taken = {other.slot for other in self.all if other.status == "training"}
            free = [slot for slot in range(1, self.prepared.slots + 1) if slot not in taken]
            if not free:
                return
            if tenant.status != "waiting":
                continue
            try:
                self._join(tenant, free[0])
                if tenant.step >= tenant.run.steps:  # it was killed before it ended
                    self._finish(tenant)
            except _OF_A_TENANT as error:
                tenant.set_aside(error)

    def _join(self, tenant: Tenant, slot: int) -> None:
        """Put a tenant into a slot, at its start or from its last checkpoint, and measure it before its first step."""
        run = tenant.run
        adapter = initial_adapter(run.pretrained, run.options.run.seed)
        values = slot_values(self.abstract, dataclasses.replace(adapter, name=tenant.name))
        chosen, peak = run.options.optimizer, float(_peak(run))
        settings = slot_settings(run.spec.optimizer, chosen.schedule, peak, run.steps, chosen.warmup(run.steps))
        matrices, scale = nnx.split_state(values, nnx.LoRAParam, SlotScale)
        own = new_slot(matrices, scale, settings)
        self.state = put_slot(self.state, slot, own)
        if tenant.saved is not None:
            saved, position = tenant.store.restore(get_slot(self.state, slot))
            if run.batches.get_state() != position:
                run.batches.set_state(position)
            # A run that is extended has another schedule than when it was saved.
            self.state = put_slot(self.state, slot, dataclasses.replace(saved, settings=settings))
            _logger.info("%s goes on after step %d of %d.", tenant.name, tenant.step, run.steps)
        tenant.slot, tenant.status = slot, "training"
        if tenant.step == 0 and run.objective.held_out is not None:
            tenant.log.add({"step": 0, **self._evaluation(tenant)})

    def _round(self, training: Sequence[Tenant]) -> None:
        """Do one step of every tenant that trains."""
        start, met, batches = time.perf_counter(), [], []
        for tenant in training:
            try:
                batches.append(next(tenant.run.batches))
                met.append(tenant)
            except (*_OF_A_TENANT, StopIteration) as error:
                tenant.set_aside(error)
        if not met:
            return
        slots = np.full(self.prepared.slots, self.prepared.slots + 1, np.int32)  # beyond the bank: no tenant
        slots[: len(met)] = [tenant.slot for tenant in met]
        adapter, scale, sums = self.programs.begin(self.state, slots)
        for objective, length in self.prepared.lengths.items():
            shares = [
                Share(place, batch, _units(tenant, batch), _row_settings(tenant))
                for place, (tenant, batch) in enumerate(zip(met, batches, strict=True))
                if tenant.run.spec.objective.name == objective
            ]
            for batch in micro_batches(shares, objective, rows=self.prepared.rows, length=length) if shares else ():
                sums = self.programs.accumulate[objective](adapter, scale, sums, self.frozen, batch)
        self.state, metrics = self.programs.update(self.state, slots, sums)
        found = jax.device_get(metrics)  # waits for the step
        seconds = time.perf_counter() - start
        for place, (tenant, batch) in enumerate(zip(met, batches, strict=True)):
            own = {name: float(values[place]) for name, values in found.items()}
            try:
                self._record(tenant, batch, own, seconds)
            except _OF_A_TENANT as error:
                tenant.set_aside(error)

    def _record(self, tenant: Tenant, batch: Any, found: dict[str, float], seconds: float) -> None:
        """Write what a step of a tenant found, evaluate, save and finish it where that is due."""
        tenant.check_finite(found["loss"], found["grad_norm"])
        tenant.step += 1
        run, options = tenant.run, tenant.run.options.run
        speed = run.objective.count_tokens(batch) / seconds
        objective = run.spec.objective
        names = ("grad_norm", *(METRICS if objective.name == "dpo" else ("loss",)))
        values = {name: found[name] for name in names} | {objective.unit.name: _units(tenant, batch)}
        row = tenant.records.row(tenant.step, values, tokens_per_second=speed)
        if run.objective.held_out is not None and tenant.due(options.eval_every):
            row |= self._evaluation(tenant)
        tenant.log.add(row)
        if tenant.due(options.save_every):
            tenant.save(get_slot(self.state, tenant.slot))
        if tenant.step == run.steps:
            self._finish(tenant)

    def _finish(self, tenant: Tenant) -> None:
        """Save the adapter of a tenant at its last step, as a run of its own does."""
        values = get_slot(self.state, tenant.slot)
        graphdef, adapter, frozen = split(model_of_slot(tenant.run.pretrained, self.frozen, values.adapter))
        initial = tenant.run.pretrained.adapter
        rows, last = tenant.log.rows, tenant.step
        finish(TrainedRun(tenant.run, graphdef, adapter, frozen, rows, last, tenant.picture, initial, None))
        tenant.status = "finished"

    def _save_all(self) -> None:
        """Save every tenant that trains, before the process ends."""
        for tenant in self.all:
            if tenant.status == "training" and tenant.saved != tenant.step:
                try:
                    tenant.save(get_slot(self.state, tenant.slot))
                except _OF_A_TENANT as error:
                    tenant.set_aside(error)

    def _evaluation(self, tenant: Tenant) -> dict[str, float]:
        """Return the held-out metrics of a tenant as it is now."""
        rows, objective = self.prepared.rows, tenant.run.spec.objective.name
        length, own = self.prepared.lengths[objective], _row_settings(tenant)
        of_rows: dict[str, Any] = {name: np.full(rows, value, np.float32) for name, value in own.items()}
        of_rows["adapter_ids"] = np.zeros(rows, np.int32)
        adapter, scale, _ = self.programs.begin(self.state, np.full(1, tenant.slot, np.int32))
        assert tenant.run.objective.held_out is not None
        metrics = mean_metrics(
            lambda parts, frozen, batch: self.evaluate[objective](*parts, frozen, batch),
            _Evaluated((adapter, scale)),  # pyright: ignore[reportArgumentType]
            self.frozen,
            tenant.run.objective.held_out(rows),
            put=lambda batch: padded_rows(batch, objective, length, rows) | of_rows,  # pyright: ignore[reportArgumentType]
            progress=False,
        )
        return {f"eval_{name}": value for name, value in metrics.items()}


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """A tenant's values where `mean_metrics` expects those of a state."""

    adapter: Any


def _of_tokens(graphdef: Any, adapter: Any, scale: Any, frozen: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return the summed metrics of one held-out micro-batch, and its learned tokens."""
    loss, more = language_model_metrics(nnx.merge(graphdef, adapter, scale, frozen), batch, None)
    return {"loss": loss, **more}, TOKENS.count(batch)


def _of_pairs(graphdef: Any, adapter: Any, scale: Any, frozen: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return the summed metrics of one held-out micro-batch of pairs, and how many of them count."""
    rows = preference_row_losses(nnx.merge(graphdef, adapter, scale, frozen), batch)
    return {name: values.sum() for name, values in rows.items()}, PAIRS.count(batch)


_SUMS = {"sft": _of_tokens, "dpo": _of_pairs}


def _units(tenant: Tenant, batch: Any) -> float:
    """Return the learned tokens, or pairs, of a batch."""
    return float(tenant.run.spec.objective.unit.count(batch))


def _row_settings(tenant: Tenant) -> dict[str, float]:
    """Return the settings of a tenant's objective that its rows carry."""
    if tenant.run.spec.objective.name != "dpo":
        return {}
    given = {name.removeprefix("dpo_"): value for name, value in tenant.run.options.objective.given().items()}
    return {"beta": 0.1, "label_smoothing": 0.0} | given


def _peak(run: Any) -> float:
    """Return the highest learning rate of a run: that of the step after its warm-up."""
    return run.learning_rate(run.options.optimizer.warmup(run.steps))
