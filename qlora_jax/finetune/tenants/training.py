"""The second and third stage of many runs: the base is read once, and the tenants train together, round by round.

    while a tenant has steps left:
        tenants rest or go on as the files `pause` in their folders say
        free slots go to the tenants that wait, in their order
        one step of every tenant that trains                      rounds.py, train.tenants; as many at once as have slots
        for each tenant: its record, evaluation and checkpoint when they are due, as a run of its own has them
        a tenant at its last step is finished as a run of its own, and its slot is free
        a tenant that failed is set aside, and its slot is free

Every tenant that trains does one step a round, so that none is held up by another. What one tenant's files or data raise is
that tenant's alone. Its files are open while it trains.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from qlora_jax.adapters.bank import slot_values
from qlora_jax.adapters.tenants import initial_adapter, model_of_slot
from qlora_jax.errors import QLoRAError
from qlora_jax.finetune.finish import finish
from qlora_jax.finetune.lock import locked
from qlora_jax.finetune.tenants.evaluation import Evaluation
from qlora_jax.finetune.tenants.prepare import PreparedTenants
from qlora_jax.finetune.tenants.rounds import Share, micro_batches, row_settings, shared_length
from qlora_jax.finetune.tenants.slots import Slots
from qlora_jax.finetune.tenants.table import Table
from qlora_jax.finetune.tenants.tenant import Tenant
from qlora_jax.finetune.training import TrainedRun
from qlora_jax.interrupts import Interrupted, deferred
from qlora_jax.models import Model
from qlora_jax.peft.bank import SlotScale
from qlora_jax.train import split
from qlora_jax.train.tenant_slots import new_slot, slot_settings, split_tenants
from qlora_jax.train.tenants import METRICS, TenantPrograms, tenant_programs

__all__ = ["train_tenants"]

_logger = logging.getLogger(__name__)
_OF_A_TENANT = (QLoRAError, OSError, ValueError)  # what a tenant's data and files raise


def train_tenants(prepared: PreparedTenants, *, progress: bool = True) -> list[Tenant]:
    """Read the base, train all tenants and finish each as a run of its own; return them, set aside, paused or finished.

    Raises:
        OptionError: another process trains tenants of this file.
        CheckpointError: weights of the base that are NaN or infinite.
        Interrupted: after Ctrl-C or SIGTERM, once the round is done and every tenant is saved.
    """
    with locked(prepared.output):
        model, _ = prepared.pretrained.load_base(progress=progress)
        tenants = _Tenants(prepared, model)
        del model
        try:
            tenants.run(Table(progress=progress))
        finally:
            for tenant in tenants.all:
                tenant.close()
    return tenants.all


class _Tenants:
    """The tenants, the state of the slots, and the programs: what the loop changes."""

    def __init__(self, prepared: PreparedTenants, model: Model) -> None:
        self.prepared = prepared
        self.all = [Tenant(name, run) for name, run in prepared.runs.items()]
        self.abstract = prepared.pretrained.abstract
        graphdef, adapter, scale, self.frozen = split_tenants(model)
        self.slots = Slots(adapter, scale, prepared.slots, turns=prepared.host_states)
        self.programs: TenantPrograms = tenant_programs(graphdef, prepared.pretrained.dtype)
        self.evaluation = Evaluation(graphdef, self.frozen, prepared.rows)

    def run(self, table: Table) -> None:
        """Train until every tenant is finished, paused or set aside."""
        with deferred("this round is finished and saved first; once more stops at once") as signals:
            while True:
                self._pauses()
                self._fill_slots()
                training = [tenant for tenant in self.all if tenant.status == "training"]
                if not training:
                    break
                for start in range(0, len(training), self.prepared.slots):
                    self._step([t for t in training[start : start + self.prepared.slots] if t.status == "training"])
                table.show(self.all)
                if signals.number is not None:
                    self._save_all()
                    break
        table.show(self.all, now=True)
        if signals.number is not None:
            raise Interrupted("stopped after a round, which is saved for every tenant", signals.number)

    def _pauses(self) -> None:
        """Let tenants rest whose folders hold a file `pause`, and others wait for a slot again."""
        for tenant in self.all:
            if tenant.status == "paused" and not tenant.wants_pause():
                tenant.status = "waiting"
            elif tenant.status == "waiting" and tenant.wants_pause():
                tenant.status = "paused"
            elif tenant.status == "training" and tenant.wants_pause() and self._save(tenant):
                self._end(tenant, "paused")

    def _fill_slots(self) -> None:
        """Let tenants that wait train while there are slots."""
        for tenant in self.all:
            if not self.slots.free():
                return
            if tenant.status != "waiting":
                continue
            try:
                self._join(tenant)
                if tenant.step >= tenant.run.steps:  # it was killed before it ended
                    self._finish(tenant)
            except _OF_A_TENANT as error:
                self._set_aside(tenant, error)

    def _join(self, tenant: Tenant) -> None:
        """Put a tenant into a slot, at its start or from its last checkpoint, and measure it before its first step."""
        run = tenant.run
        tenant.open()
        adapter = initial_adapter(run.pretrained, run.options.run.seed)
        values = slot_values(self.abstract, dataclasses.replace(adapter, name=tenant.name))
        chosen, peak = run.options.optimizer, float(_peak(run))
        settings = slot_settings(run.spec.optimizer, chosen.schedule, peak, run.steps, chosen.warmup(run.steps))
        matrices, scale = nnx.split_state(values, nnx.LoRAParam, SlotScale)
        self.slots.put(tenant, new_slot(matrices, scale, settings))
        if tenant.saved is not None:
            saved, position = tenant.files.store.restore(self.slots.values(tenant))
            if tenant.files.store.latest_step() != tenant.saved:  # a damaged checkpoint was put aside
                tenant.close()
                tenant.open()  # with the records up to the step of the one before
            if run.batches.get_state() != position:
                run.batches.set_state(position)
            # A run that is extended has another schedule than when it was saved.
            self.slots.put(tenant, dataclasses.replace(saved, settings=settings))
            _logger.info("%s goes on after step %d of %d.", tenant.name, tenant.step, run.steps)
        tenant.status = "training"
        if tenant.step == 0 and run.objective.held_out is not None:
            tenant.add({"step": 0, **self.evaluation(tenant, self.slots.state)})

    def _step(self, training: Sequence[Tenant]) -> None:
        """Do one step of tenants that train, at most as many as there are slots."""
        start, met, batches = time.perf_counter(), [], []
        for tenant in training:
            try:
                batches.append(next(tenant.run.batches))
                met.append(tenant)
            except (*_OF_A_TENANT, StopIteration) as error:
                self._set_aside(tenant, error)
        if not met:
            return
        slots = self.slots.bring(met)
        sums = self.programs.begin(self.slots.state, slots)
        shares: dict[tuple[str, int], list[Share]] = {}
        for place, (tenant, batch) in enumerate(zip(met, batches, strict=True)):
            objective = tenant.run.spec.objective.name
            own = Share(place, batch, _units(tenant, batch), row_settings(tenant.run))
            shares.setdefault((objective, shared_length(tenant.run.objective.length)), []).append(own)
        for (objective, length), rows in sorted(shares.items(), key=lambda item: item[0]):
            for batch in micro_batches(rows, objective, rows=self.prepared.rows, length=length):
                sums = self.programs.accumulate[objective](slots, self.slots.state, sums, self.frozen, batch)
        self.slots.state, metrics = self.programs.update(self.slots.state, slots, sums)
        found = jax.device_get(metrics)  # waits for the step
        seconds = time.perf_counter() - start
        for place, (tenant, batch) in enumerate(zip(met, batches, strict=True)):
            own = {name: float(values[place]) for name, values in found.items()}
            try:
                self._record(tenant, batch, own, seconds)
            except _OF_A_TENANT as error:
                self._set_aside(tenant, error)

    def _record(self, tenant: Tenant, batch: Any, found: dict[str, float], seconds: float) -> None:
        """Write what a step of a tenant found, evaluate, save and finish it where that is due."""
        tenant.check_finite(found["loss"], found["grad_norm"])
        tenant.step += 1
        run, options = tenant.run, tenant.run.options.run
        speed = run.objective.count_tokens(batch) / seconds
        objective = run.spec.objective
        names = ("grad_norm", *(METRICS if objective.name == "dpo" else ("loss",)))
        values = {name: found[name] for name in names} | {objective.unit.name: _units(tenant, batch)}
        row = tenant.files.records.row(tenant.step, values, tokens_per_second=speed)
        if run.objective.held_out is not None and tenant.due(options.eval_every):
            row |= self.evaluation(tenant, self.slots.state)
        tenant.add(row)
        if tenant.due(options.save_every):
            tenant.save(self.slots.values(tenant))
        if tenant.step == run.steps:
            self._finish(tenant)

    def _finish(self, tenant: Tenant) -> None:
        """Save the adapter of a tenant at its last step, as a run of its own does."""
        values = self.slots.values(tenant)
        graphdef, adapter, frozen = split(model_of_slot(tenant.run.pretrained, self.frozen, values.adapter))
        initial, files = tenant.run.pretrained.adapter, tenant.files
        finish(TrainedRun(tenant.run, graphdef, adapter, frozen, files.log.rows, tenant.step, files.picture, initial, None))
        self._end(tenant, "finished")

    def _set_aside(self, tenant: Tenant, error: Exception) -> None:
        tenant.set_aside(error)
        self._end(tenant, "set aside")

    def _end(self, tenant: Tenant, status: Any) -> None:
        """Take a tenant out of its slot and close its files."""
        tenant.status = status
        self.slots.leave(tenant)
        tenant.close()

    def _save(self, tenant: Tenant) -> bool:
        """Save a tenant at its step; one that cannot be saved is set aside."""
        try:
            if tenant.saved != tenant.step:
                tenant.save(self.slots.values(tenant))
        except _OF_A_TENANT as error:
            self._set_aside(tenant, error)
        return tenant.status == "training"

    def _save_all(self) -> None:
        """Save every tenant that trains, before the process ends."""
        for tenant in self.all:
            if tenant.status == "training":
                self._save(tenant)


def _units(tenant: Tenant, batch: Any) -> float:
    """Return the learned tokens, or pairs, of a batch."""
    return float(tenant.run.spec.objective.unit.count(batch))


def _peak(run: Any) -> float:
    """Return the highest learning rate of a run: that of the step after its warm-up."""
    return run.learning_rate(run.options.optimizer.warmup(run.steps))
