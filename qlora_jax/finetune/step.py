"""The training step that a run's options describe.

The job and the plan of a job both call `step_spec`, so that they agree on every default: which dtype and which remat "auto"
stands for on a platform, how long a row is, and what trains beside the adapter.
"""

import dataclasses
from typing import Literal, cast

from qlora_jax.errors import OptionError
from qlora_jax.finetune.objectives import objective_kind
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.virtual_tokens import check_rows
from qlora_jax.models import ModelConfig, ModelSpec, check_heads
from qlora_jax.peft import LoRA, Method
from qlora_jax.quant import Quantization
from qlora_jax.train import BatchSpec, OptimizerSpec, StepObjective, StepSpec


def step_spec(
    options: Options,
    config: ModelConfig,
    platform: str,
    *,
    method: Method | None = None,
    quantization: Quantization | Literal["from options"] | None = "from options",
) -> StepSpec[ModelSpec]:
    """Return the training step of a run with these options.

    Args:
        options: the options of the run.
        config: the config of the model.
        platform: the platform of the devices ("cpu", "gpu", "cuda" or "tpu").
        method: the method of fine-tuning, if it is not that of the options: a run may continue from an adapter.
        quantization: the storage of the linear layers, if it is not that of the options: a checkpoint may be quantised
            already.

    Raises:
        OptionError: the options contradict each other or the model.
    """
    options.check()
    mesh = options.run.mesh_shape
    if mesh is not None:
        check_heads(config, mesh.tensor)
    options.context.check(config, options.objective.objective)
    if method is None:
        method, config = _method(options, config)
    on_cpu, model = platform == "cpu", options.model
    if options.optimizer.loraplus_lr_ratio is not None and not method.rank:
        raise OptionError(f"loraplus_lr_ratio: expected none with {method.peft_type}, which has no A and B")
    kind = objective_kind(options.objective.objective, config)
    kind.check(options)
    objective = kind.step(options)
    length = _row_length(options, objective)
    check_rows(method, config, length, packed=objective.packed)
    return StepSpec(
        ModelSpec(
            config,
            quantization=model.quantization() if quantization == "from options" else quantization,
            embedding_storage=model.embedding_storage,
            method=method,
            dtype=("float32" if on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype,
            remat=("dots" if on_cpu else "full") if model.remat == "auto" else model.remat,
        ),
        objective,
        batch_spec(options, length=length),
        optimizer_spec(options),
        mesh,
    )


def batch_spec(options: Options, *, length: int, source_length: int | None = None) -> BatchSpec:
    """Return the batch of a step, with the batch size and the accumulation of the options."""
    return BatchSpec(options.run.batch_size, options.run.accumulation_steps, length, source_length)


def optimizer_spec(options: Options) -> OptimizerSpec:
    """Return the optimizer of the options."""
    chosen = options.optimizer
    return OptimizerSpec(
        name=chosen.optimizer,
        beta1=chosen.beta1,
        beta2=chosen.beta2,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm or None,
        loraplus_lr_ratio=chosen.loraplus_lr_ratio,
        host_optimizer=chosen.host_offload or chosen.host_adapter,
        host_adapter=chosen.host_adapter,
    )


def _row_length(options: Options, objective: StepObjective) -> int:
    """Return the most tokens that a row can have, without a look at the data."""
    data = options.data
    if objective.packed or data.streaming:
        return data.max_length
    # Inputs have one token less than an example, and are padded to a multiple of 64 that the longest example needs.
    return min(-(-(data.max_length - 1) // 64) * 64, data.max_length)


def _method(options: Options, config: ModelConfig) -> tuple[Method, ModelConfig]:
    """Return the method of the options, and the config with an embedding for each new special token, all of which train."""
    method = options.context.with_trained_modules(options.method(), config)
    count, size = len(options.lora.special_tokens), config.vocab_size
    if not count:
        return method, config
    lora = cast(LoRA, method)  # `options.check` allows special tokens with LoRA alone
    tokens = (*lora.trainable_token_indices, *range(size, size + count))
    return (
        dataclasses.replace(lora, trainable_token_indices=tokens),
        dataclasses.replace(config, vocab_size=size + count),
    )
