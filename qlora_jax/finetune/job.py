"""The main job: a checkpoint and a data set in, an adapter out.

    options  ->  everything that can be wrong is found      checkpoint headers, tokenizer, data, output folder
             ->  the objective: what is learned             answers, preferences or targets (objective.py)
             ->  the base model, quantised while it is read, and the steps, compiled meanwhile
             ->  training with evaluation and checkpoints   <output>/checkpoints, metrics.jsonl, loss.png
                 (with early stopping, also its best state  <output>/best)
             ->  what the run leaves (finish.py)            <output>/adapter, in PEFT's format, with a model card
                 (after full fine-tuning, the model         <output>/model)
                 figures of the held-out split              <output>/eval_results.json
                 answers to prompts of it, before and after
             ->  the adapter on the hub, where asked

The same command on the same folder goes on where it was stopped.
"""

import dataclasses
import math
import sys
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.bind import adapter_tensors, check_family, load_adapter
from qlora_jax.adapters.files import Adapter, read_adapter
from qlora_jax.adapters.metadata import AdapterMetadata, read_adapter_metadata, with_scaling
from qlora_jax.adapters.special_tokens import add_special_tokens, grown, training_tokens, with_tokens
from qlora_jax.adapters.weight_init import FromWeights, converted_from, parted, rewriting
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.fill import Rewrite
from qlora_jax.checkpoint.load import load_model, storage_of, with_tied
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, stop_ids, tokenizer_source
from qlora_jax.export.merge import check_all
from qlora_jax.finetune.eva import MOST_BATCHES, start_from_inputs
from qlora_jax.finetune.finish import finish
from qlora_jax.finetune.folder import claim, complete
from qlora_jax.finetune.memory import check_memory
from qlora_jax.finetune.objectives.objective import Batches, Objective, Setting
from qlora_jax.finetune.objectives.registry import objective_for
from qlora_jax.finetune.options.context import warn_beyond
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.options.tuning import own_rate
from qlora_jax.finetune.reporting import watch
from qlora_jax.finetune.reporting.hub import upload
from qlora_jax.finetune.step import batch_spec, step_spec
from qlora_jax.finetune.training import TrainingRun, precompile_run, train_adapter
from qlora_jax.finetune.virtual_tokens import check_rows, first_tokens, named_tokenizer, started
from qlora_jax.models import Model, ModelSpec, RopeScaling, family_of, method_for, positions_left
from qlora_jax.nn import data_mesh, place
from qlora_jax.peft import LoRA, Method
from qlora_jax.train import StepSpec, learning_rate_schedule, split


def finetune(options: Options, *, progress: bool = True) -> Path:
    """Runs the job; returns the folder of the adapter.

    Raises:
        ValueError, OSError: bad input, in one message, before any long work; a loss that diverged.
    """
    options.check()
    method, quantization, mesh = options.method(), options.model.quantization(), data_mesh()
    begin, trained, taken = None, None, None
    if options.model.adapter is not None:
        trained = read_adapter_metadata(options.model.adapter)
        begin, taken = parted(read_adapter(options.model.adapter), trained)
    if begin is not None:
        method = begin.method
        if isinstance(method, LoRA):
            method = dataclasses.replace(method, dropout=options.lora.dropout)
    if options.optimizer.loraplus_lr_ratio is not None and not isinstance(method, LoRA):
        raise ValueError(f"loraplus_lr_ratio: expected none with {method.peft_type}, which has no A and B")
    claim(options)
    name = options.model.model or str(fetch_default_model())
    checkpoint, tokenizer, method, scaling = _open(options, name, begin, method, trained)
    family = family_of(checkpoint.config)
    quantization = storage_of(checkpoint, quantization)
    eos_ids = stop_ids(name, options.model.revision, tokenizer)
    config = family.config(checkpoint.config)
    options.context.check(config, options.objective.objective)
    check_all(with_tied(checkpoint, family), begin)
    method = method_for(named_tokenizer(method, name), config) or method
    starts_as = first_tokens(method, tokenizer, config, options.run.seed)
    nnx.eval_shape(lambda: family.model(config, method=method, rngs=nnx.Rngs(0)))  # does the adapter find what it names?
    positions = positions_left(config, method)
    room = config if positions is None else dataclasses.replace(config, max_position_embeddings=positions)
    watched = watch.prepare(options, tokenizer, room, _say, progress=progress)
    setting = Setting(options, tokenizer, config, eos_ids, _say, progress)
    objective = objective_for(options, config).read(setting)
    check_rows(method, config, objective.longest, packed=objective.step.packed)
    rewrite = rewriting(method, taken, quantization)
    start = converted_from(method) if taken is None or trained is None else trained.converted_from
    record = AdapterMetadata(quantization, objective.template, options.model.embedding_storage, start, scaling)
    _compare(trained, record)
    warn_beyond(config, objective.longest, _say)
    source = objective.training(_rows(options))
    steps = _steps(options, source)
    watch.check_prompts(options, objective.prompts)
    spec = step_spec(options, config, jax.default_backend(), method=method, quantization=quantization)
    batch = batch_spec(options, length=objective.length, source_length=objective.source_length)
    spec = dataclasses.replace(spec, objective=objective.step, batch=batch)
    if options.run.memory_check:
        check_memory(spec, _say)
    parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    learning_rate = learning_rate_schedule(
        options.optimizer.schedule,
        options.optimizer.peak_learning_rate(
            parameters, options.objective.objective, options.tuning.method, own_rate(method)
        ),
        steps,
        round(steps * options.optimizer.warmup_ratio),
    )
    run = TrainingRun(options, objective, spec, source, steps, learning_rate, watched, _say, progress)
    with closing(precompile_run(run)) as precompiled:
        model = _load(options, checkpoint, spec, mesh, rewrite, progress)
        first = begin  # what answers before training, where that is not the base
        if begin is not None:
            model = load_adapter(model, begin)
        elif isinstance(rewrite, FromWeights):
            model = rewrite.fill(model)
            first = Adapter("the run's start", method, None, adapter_tensors(model))
        elif isinstance(method, LoRA) and method.init_lora_weights == "eva":
            model = _start_from_inputs(options, model, method, spec, objective, mesh, progress)
        else:
            model = started(model, starts_as)
        graphdef, adapter, frozen = split(spec.objective.prepare(model))
        del model
        _say(_describe(adapter, frozen, steps, options, objective))
        with _spread_over(mesh):
            adapter, rows = train_adapter(run, graphdef, adapter, frozen, precompiled)
    del precompiled  # and the programs
    with _spread_over(mesh):
        folder = finish(
            options,
            objective,
            graphdef,
            adapter,
            frozen,
            rows,
            name=name,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            config=config,
            method=method,
            record=record,
            begin=begin,
            first=first,
            taken={} if rewrite is None else rewrite.tensors,
            questions=watched.questions,
            say=_say,
            progress=progress,
        )
    if options.watch.push_to_hub:
        _say(f"Uploaded the adapter: {upload(folder, options.watch.push_to_hub)}")
    complete(options)
    return folder


def _spread_over(mesh: Mesh | None) -> AbstractContextManager[Any]:
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def _steps(options: Options, source: Batches) -> int:
    """How many steps the run has."""
    steps, most = 0, options.run.max_steps
    for epoch in range(options.run.epochs):
        if most is not None and steps >= most:  # counting the batches of an epoch means to pack it
            break
        count = source.batches_in_epoch(epoch)
        if count is None:
            assert most is not None  # as `options.check` has made sure
            return most
        steps += count
    return steps if most is None else min(steps, most)


def _open(
    options: Options, name: str, begin: Adapter | None, method: Method, trained: AdapterMetadata | None
) -> tuple[Checkpoint, PreTrainedTokenizerFast, Method, RopeScaling | None]:
    """The base with its tokenizer, all tokens of the run and its scaling of positions; and what trains, with new tokens."""
    checkpoint = open_checkpoint(name, options.model.revision)
    own = tokenizer_source(name, options.model.adapter)
    tokenizer = load_tokenizer(own, options.model.revision if own == name else None)
    if begin is not None:
        check_family(begin, checkpoint.config["model_type"])
        checkpoint = grown(checkpoint, begin)
    check_tokenizer(tokenizer, checkpoint.config)
    config = family_of(checkpoint.config).config(checkpoint.config)
    scaling = options.context.scaling(config, options.data.max_length) or (trained and trained.scaling)
    checkpoint = with_scaling(checkpoint, scaling)
    if begin is None and isinstance(method, LoRA):
        modules = options.context.trained(method.modules_to_save, config.parameter_mappings)
        method = dataclasses.replace(method, modules_to_save=modules)
    if options.lora.special_tokens and isinstance(method, LoRA):
        tokens = add_special_tokens(tokenizer, options.lora.special_tokens)
        checkpoint = with_tokens(checkpoint, tokens)
        method = training_tokens(method, checkpoint, tokens)
    return checkpoint, tokenizer, method, scaling


def _rows(options: Options) -> int:
    """Rows of one step."""
    return options.run.batch_size * options.run.accumulation_steps * jax.device_count()


def _load(
    options: Options,
    checkpoint: Checkpoint,
    spec: StepSpec[ModelSpec],
    mesh: Mesh | None,
    rewrite: Rewrite | None,
    progress: bool,
) -> Model:
    return load_model(
        checkpoint,
        quantization=spec.model.quantization,
        embedding_storage=spec.model.embedding_storage,
        method=spec.model.method,
        dtype=spec.model.dtype,
        remat=spec.model.remat,
        mesh=mesh,
        seed=options.run.seed,
        progress=progress,
        rewrite=rewrite,
    )


def _start_from_inputs(
    options: Options,
    model: Model,
    lora: LoRA,
    spec: StepSpec[ModelSpec],
    objective: Objective,
    mesh: Mesh | None,
    progress: bool,
) -> Model:
    def build(method: Any) -> Model:
        return type(model)(
            model.config,  # type: ignore[arg-type]
            quantization=spec.model.quantization,
            embedding_storage=spec.model.embedding_storage,
            method=method,
            dtype=jnp.dtype(spec.model.dtype),
            attention=model.attention,
            remat=model.remat,
            rngs=nnx.Rngs(0),
        )

    rows = objective.training(options.run.batch_size * jax.device_count())
    read = (next(rows) for _ in range(MOST_BATCHES))
    batches = (
        place(mesh, {name: batch[name] for name in objective.step.array_names}, PartitionSpec("data")) for batch in read
    )
    with _spread_over(mesh):
        return start_from_inputs(model, build, lora, objective.step.held_out_loss, batches, progress=progress)


def _compare(trained: AdapterMetadata | None, now: AdapterMetadata) -> None:
    """Says where the adapter that the run goes on from was trained otherwise."""
    if trained is not None and trained != now:
        _say(f"The adapter was trained with {trained}, and goes on with {now}.")


def _describe(adapter: Any, frozen: Any, steps: int, options: Options, objective: Objective) -> str:
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))
    return (
        f"{trainable:,} trainable parameters; frozen weights {weights / 2**20:,.0f} MiB; "
        f"{steps} steps of {_rows(options)} × {objective.row} on {jax.device_count()} {jax.devices()[0].device_kind}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
