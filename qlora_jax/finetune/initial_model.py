"""The model that training starts from: the base is loaded, and the adapter gets its initial values."""

from typing import Any, NamedTuple, cast

import jax
from flax import nnx

from qlora_jax.adapters.bind import adapter_tensors, load_adapter
from qlora_jax.adapters.files import Adapter
from qlora_jax.finetune.eva import MOST_BATCHES, start_from_inputs
from qlora_jax.finetune.prepare import PreparedRun
from qlora_jax.finetune.virtual_tokens import start_from
from qlora_jax.models import Model
from qlora_jax.nn import data_mesh, mesh_context, put_rows
from qlora_jax.peft import LoRA, Subtracted

__all__ = ["InitialModel", "load_initial_model"]


class InitialModel(NamedTuple):
    """The loaded model.

    Attributes:
        model: the base with the adapter.
        initial_adapter: the adapter of the model before training, where the base alone is another function; None: the base
            alone is what training starts from.
        subtracted: what was subtracted from the weights of the base before these were stored; None: nothing.
    """

    model: Model
    initial_adapter: Adapter | None
    subtracted: Subtracted | None


def load_initial_model(run: PreparedRun) -> InitialModel:
    """Read the weights of the base and return the model that training starts from.

    Raises:
        CheckpointError: weights that are NaN or infinite.
        DataError: too little data to initialize the adapter from.
    """
    pretrained, method = run.pretrained, run.method
    model, subtracted = pretrained.load_base(mesh=data_mesh(run.spec.mesh), seed=run.options.run.seed, progress=run.progress)
    if pretrained.adapter is not None:
        return InitialModel(load_adapter(model, pretrained.adapter), pretrained.adapter, subtracted)
    if method.reads_original_weights:
        return InitialModel(model, Adapter("the run's start", method, None, adapter_tensors(model)), subtracted)
    if method.reads_inputs:
        return InitialModel(_start_from_training_data(run, model), None, subtracted)
    return InitialModel(start_from(model, run.initial_tokens), None, subtracted)


def _start_from_training_data(run: PreparedRun, model: Model) -> Model:
    """Initialize A from the inputs of the layers on the first batches of the run (EVA)."""
    mesh, spec, lora = data_mesh(run.spec.mesh), run.spec, cast(LoRA, run.method)

    def build(method: Any) -> Model:
        return run.pretrained.with_method(method).spec.build(nnx.Rngs(0), model.attention)

    rows = run.objective.training(run.options.run.micro_batch_rows(jax.device_count()))
    read = (next(rows) for _ in range(MOST_BATCHES))
    batches = (put_rows(mesh, spec.select(batch)) for batch in read)
    with mesh_context(mesh):
        return start_from_inputs(model, build, lora, spec.objective.held_out_loss, batches, progress=run.progress)
