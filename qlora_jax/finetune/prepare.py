"""The first stage of a run: everything that can be wrong is found, and no weights are read.

options            checked against each other
output folder      free, or holding this very run unfinished (folder.py)
model              names, headers, tokenizer, and an abstract model that base, adapter and method fit
reporting          trackers, the hub's repository, the questions of MMLU
objective          the data, as batches
step               what one step computes, and whether the devices have the memory for it
"""

import dataclasses
import logging
import math

import jax
import numpy as np
import optax
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.pretrained import Pretrained, open_unchecked
from qlora_jax.adapters.weight_init import converted_from
from qlora_jax.data import read_chat_template, unknown_markers
from qlora_jax.errors import list_names
from qlora_jax.evaluate import Prompts
from qlora_jax.finetune.folder import claim
from qlora_jax.finetune.lock import check_unlocked
from qlora_jax.finetune.memory import check_memory
from qlora_jax.finetune.objectives import Batches, Objective, Setting, objective_kind
from qlora_jax.finetune.options.context import warn_beyond
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.options.run import RunOptions
from qlora_jax.finetune.reporting.callbacks import check_prompts, check_reporting
from qlora_jax.finetune.reporting.mmlu import read_prompts
from qlora_jax.finetune.resume import find_position
from qlora_jax.finetune.sources import check_sources
from qlora_jax.finetune.step import batch_spec, step_spec
from qlora_jax.finetune.virtual_tokens import first_tokens
from qlora_jax.models import ModelConfig, ModelSpec, method_for, positions_left
from qlora_jax.nn import is_main, several, shape_on
from qlora_jax.peft import Method
from qlora_jax.train import Goodput, StepSpec, learning_rate_schedule

__all__ = ["PreparedRun", "prepare"]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """Everything that training needs, before any weights are read.

    Attributes:
        options: the options of the run.
        pretrained: the base with its tokenizer, the method, and the adapter that the run continues from.
        spec: the training step.
        objective: the data, and how answers and scores are made.
        batches: the batches to train on, at the position of the newest checkpoint.
        steps: the number of steps of the whole run.
        learning_rate: the learning rate by step.
        adapter_metadata: what is recorded beside the adapter.
        initial_tokens: the tokens whose embeddings the virtual tokens start from; None: no such tokens.
        questions: the questions of MMLU; None for none.
        progress: whether to show progress bars.
        goodput: the time of the run by its causes, from the start of this stage on.
    """

    options: Options
    pretrained: Pretrained
    spec: StepSpec[ModelSpec]
    objective: Objective
    batches: Batches
    steps: int
    learning_rate: optax.Schedule
    adapter_metadata: AdapterMetadata
    initial_tokens: np.ndarray | None
    questions: Prompts | None
    progress: bool
    goodput: Goodput = dataclasses.field(default_factory=Goodput)

    @property
    def method(self) -> Method:
        """The method of fine-tuning."""
        return method_of(self.pretrained)


def prepare(options: Options, *, progress: bool = True) -> PreparedRun:
    """Check the options and open everything that a run needs.

    Args:
        options: what to train on what.
        progress: whether to show progress bars, here and in the later stages.

    Raises:
        QLoRAError: options, data or files that cannot be used.
        OSError: files that cannot be read or written.
    """
    goodput = Goodput()
    options.check()
    if several():
        options.check_several_processes()
    shape_on(options.run.mesh_shape, jax.device_count())
    if is_main():
        check_unlocked(options.run.output)
        claim(options)
    check_sources(options.data)
    pretrained, spec = _open(options)
    config, method, tokenizer = pretrained.checkpoint.model_config, method_of(pretrained), pretrained.tokenizer
    initial_tokens = first_tokens(method, tokenizer, config, options.run.seed)
    check_reporting(options)
    questions = read_prompts(options, tokenizer, _with_positions_left(config, method))
    objective = _read_objective(options, pretrained, progress)
    spec = dataclasses.replace(
        spec,
        objective=objective.step,
        batch=batch_spec(options, length=objective.length, source_length=objective.source_length),
    )
    metadata = _adapter_metadata(options, pretrained, objective)
    batches = objective.training(options.run.rows_of_step(jax.device_count()))
    steps = count_steps(options, batches)
    learning_rate = _learning_rate(options, pretrained, steps)
    if is_main():  # the others follow it, once all of them are prepared (run.py)
        find_position(options, batches, steps, objective.held_out_checksum)
    check_prompts(options, objective.prompts)
    if options.run.memory_check:
        check_memory(spec)
    return PreparedRun(
        options=options,
        pretrained=pretrained,
        spec=spec,
        objective=objective,
        batches=batches,
        steps=steps,
        learning_rate=learning_rate,
        adapter_metadata=metadata,
        initial_tokens=initial_tokens,
        questions=questions,
        progress=progress,
        goodput=goodput,
    )


def method_of(pretrained: Pretrained) -> Method:
    """Return the method of a model that is opened for training."""
    assert pretrained.method is not None
    return pretrained.method


def _open(options: Options) -> tuple[Pretrained, StepSpec[ModelSpec]]:
    """Open the base and the adapter, with the run's own method, special tokens and positions, and describe the step.

    The abstract model is traced here. The checks, the loader and the precompiled steps share it; the memory check, which
    may plan other options, traces its own.
    """
    pretrained = open_unchecked(
        options.model.model,
        options.model.adapter,
        revision=options.model.revision,
        quantization=options.model.quantization(),
        embedding_storage=options.model.embedding_storage,
    )
    config, metadata = pretrained.checkpoint.model_config, pretrained.adapter_metadata
    scaling = options.context.scaling(config, options.data.max_length) or (metadata and metadata.scaling)
    pretrained = pretrained.with_scaling(scaling)
    if pretrained.adapter is None:
        method = options.context.with_trained_modules(options.method(), config)
    else:
        method = method_of(pretrained).with_dropout(options.lora.dropout)
    pretrained = pretrained.with_method(method).with_special_tokens(options.lora.special_tokens)
    _set_chat_template(options.data.chat_template, pretrained.tokenizer)
    config, method = pretrained.checkpoint.model_config, method_of(pretrained).with_tokenizer(pretrained.base.name)
    method = method_for(method, config) or method
    spec = step_spec(options, config, jax.default_backend(), method=method, quantization=pretrained.quantization)
    pretrained = dataclasses.replace(pretrained, method=method, dtype=spec.model.dtype, remat=spec.model.remat)
    pretrained.check()
    return pretrained, dataclasses.replace(spec, model=pretrained.spec)


def _set_chat_template(name: str | None, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the tokenizer a chat template, and say if it writes markers that are no tokens; None leaves it its own."""
    if name is None:
        return
    tokenizer.chat_template = read_chat_template(name, tokenizer)
    if unknown := unknown_markers(tokenizer.chat_template, tokenizer):
        _logger.warning(
            "The chat template %s writes markers that are no tokens of this tokenizer, so each takes several tokens: %s. "
            "--special-tokens adds them.",
            name,
            list_names(unknown),
        )


def _with_positions_left(config: ModelConfig, method: Method) -> ModelConfig:
    """Return the config with as many positions as the method's virtual tokens leave."""
    positions = positions_left(config, method)
    return config if positions is None else dataclasses.replace(config, max_position_embeddings=positions)


def _read_objective(options: Options, pretrained: Pretrained, progress: bool) -> Objective:
    """Read the data; the rows may be longer than the model's context, with a warning."""
    config = pretrained.checkpoint.model_config
    kind = objective_kind(options.objective.objective, config)
    objective = kind.read(Setting(options, pretrained.tokenizer, config, pretrained.stop_ids, progress))
    warn_beyond(config, objective.longest)
    if options.data.chat_template is not None and objective.template != "chat":
        _logger.warning(
            "The chat template %s is saved but writes none of most rows, which have the form %s; --template chat uses it.",
            options.data.chat_template,
            objective.template,
        )
    return objective


def _adapter_metadata(options: Options, pretrained: Pretrained, objective: Objective) -> AdapterMetadata:
    """Return the metadata of the adapter, and say where the adapter that the run continues from has others."""
    before = pretrained.adapter_metadata
    if pretrained.subtracted is not None and before is not None:
        start = before.converted_from
    else:
        start = converted_from(method_of(pretrained))
    metadata = AdapterMetadata(
        pretrained.quantization, objective.template, options.model.embedding_storage, start, pretrained.scaling
    )
    if before is not None and before != metadata:
        _logger.info("The adapter was trained with %s, and continues with %s.", before, metadata)
    return metadata


def count_steps(options: Options, batches: Batches) -> int:
    """Return the number of steps of the whole run: `max_steps`, or as many as its epochs have."""
    run = options.run
    if run.max_steps is not None:
        if run.epochs != RunOptions.epochs:
            _logger.info("max_steps %d decides how long the run is; epochs %g is not used.", run.max_steps, run.epochs)
        return run.max_steps
    part, whole = math.modf(run.epochs)
    steps = 0
    for epoch in range(int(whole) + (part > 0)):
        count = batches.batches_in_epoch(epoch)
        assert count is not None  # as `options.check` has made sure
        steps += count if epoch < whole else math.ceil(round(count * part, 6))  # 0.1 is not exact
    return steps


def _learning_rate(options: Options, pretrained: Pretrained, steps: int) -> optax.Schedule:
    """Return the learning rate by step."""
    checkpoint, chosen = pretrained.checkpoint, options.optimizer
    kind = objective_kind(options.objective.objective, checkpoint.model_config)
    parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    peak = chosen.peak_learning_rate(parameters, kind, method_of(pretrained))
    if chosen.weight_decay:
        _logger.info("weight_decay %g pulls towards %s.", chosen.weight_decay, _decay_target(method_of(pretrained)))
    return learning_rate_schedule(chosen.schedule, peak, steps, chosen.warmup(steps))


def _decay_target(method: Method) -> str:
    """Return what weight decay pulls a model towards: the model holds changes of the base, which it makes smaller."""
    if method.virtual_tokens:
        return "virtual tokens of zeros"
    if method.changes_base:
        return "the base without what init_lora_weights took out of its weights"
    return "the base model as it is (whatever trains is held as a change of it)"
