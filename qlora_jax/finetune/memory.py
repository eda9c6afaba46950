"""What the memory of a run follows from: its options, as `plan` takes them; and the check before anything is loaded."""

import dataclasses

from qlora_jax.finetune.options import Options
from qlora_jax.models import DecoderConfig, ModelConfig
from qlora_jax.nn import LoRA
from qlora_jax.plan.recipe import Recipe
from qlora_jax.quant import Quantization


def recipe_of(
    options: Options,
    config: ModelConfig,
    platform: str,
    *,
    lora: LoRA | None = None,
    quantization: Quantization | str | None = "asked",
) -> Recipe:
    """The recipe that a run with these options is, on devices of a platform ("cpu", "gpu", "cuda" or "tpu").

    Args:
        lora, quantization: those of the run where it knows better than its options do: an adapter to go on from, a
            checkpoint that is quantised already.

    Raises:
        ValueError: options that describe no run.
    """
    options.check()
    on_cpu, data, model = platform == "cpu", options.data, options.model
    decoder = isinstance(config, DecoderConfig)
    packed = decoder and options.objective.objective == "sft" and data.packs
    if lora is None:
        lora, config = _with_special_tokens(options, options.lora.build(), config)
    return Recipe(
        config=config,
        quantization=model.quantization() if isinstance(quantization, str) else quantization,
        lora=lora,
        dtype=("float32" if on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype,
        remat=("dots" if on_cpu else "full") if model.remat == "auto" else model.remat,
        objective=options.objective.objective,
        batch_size=options.run.batch_size,
        micro_batches=options.run.accumulation_steps,
        # Rows that are not packed have a place less than tokens, in a multiple of 64: at most that, by the longest example.
        length=data.max_length if packed or data.streaming else min(-(-(data.max_length - 1) // 64) * 64, data.max_length),
        packed=packed,
        optimizer=options.optimizer.optimizer,
        host_optimizer=options.optimizer.host_offload,
        weight_decay=options.optimizer.weight_decay,
        max_grad_norm=options.optimizer.max_grad_norm or None,
        neftune_alpha=options.optimizer.neftune_alpha if options.objective.objective == "sft" else 0.0,
        reference=options.objective.objective == "dpo" and model.adapter is not None,
    )


def _with_special_tokens(options: Options, lora: LoRA, config: ModelConfig) -> tuple[LoRA, ModelConfig]:
    """With a row of the token table more for each new token, and each of them trained."""
    count, size = len(options.lora.special_tokens), config.vocab_size
    if not count:
        return lora, config
    tokens = (*lora.trainable_token_indices, *range(size, size + count))
    return (
        dataclasses.replace(lora, trainable_token_indices=tokens),
        dataclasses.replace(config, vocab_size=size + count),
    )
