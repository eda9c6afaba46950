"""Training as pure functions of explicit state: losses, optimizers, the step and its description, and the loop around it."""

from qlora_jax.errors import DivergedError
from qlora_jax.train.bad_steps import BAD_STEP_ACTIONS, BadStepAction, BadStepPolicy
from qlora_jax.train.compiled_programs import keep_compiled_programs
from qlora_jax.train.cross_entropy import chunked_cross_entropy, token_losses
from qlora_jax.train.dpo import PAIRS, dpo_loss, with_reference, without_adapter
from qlora_jax.train.goodput import Goodput
from qlora_jax.train.held_out import mean_metrics
from qlora_jax.train.log import MetricsLog, best_evaluation, peak_memory_bytes, perplexity, plot_losses
from qlora_jax.train.loop import (
    BatchSource,
    Cadence,
    Callback,
    Checkpoints,
    Records,
    TrainingData,
    evaluation,
    train,
    unchanged_batch,
)
from qlora_jax.train.loss import (
    language_model_loss,
    language_model_metrics,
    seq2seq_loss,
    seq2seq_metrics,
    token_log_probabilities,
)
from qlora_jax.train.monitor import Monitor, ProfiledSteps
from qlora_jax.train.objectives import dpo_objective, language_model_objective, seq2seq_objective
from qlora_jax.train.offload import HostOffload, host_offload
from qlora_jax.train.optim import (
    OPTIMIZERS,
    SCHEDULES,
    Optimizer,
    OptimizerName,
    Schedule,
    adamw,
    learning_rate_schedule,
    optimizer,
)
from qlora_jax.train.placement import place_step
from qlora_jax.train.precompile import Precompiled, compile_before_run, precompile
from qlora_jax.train.spec import (
    BatchArray,
    BatchSpec,
    OptimizerSpec,
    Step,
    StepObjective,
    StepSpec,
    build_step,
)
from qlora_jax.train.stall import STALLED_EXIT_CODE, StallWatch
from qlora_jax.train.step import (
    TOKENS,
    LossFunction,
    TrainState,
    Transformation,
    Unit,
    create_state,
    init_state,
    jit_eval_step,
    jit_train_step,
    split,
    train_step,
)

__all__ = [
    "BAD_STEP_ACTIONS",
    "OPTIMIZERS",
    "PAIRS",
    "SCHEDULES",
    "STALLED_EXIT_CODE",
    "TOKENS",
    "BadStepAction",
    "BadStepPolicy",
    "BatchArray",
    "BatchSource",
    "BatchSpec",
    "Cadence",
    "Callback",
    "Checkpoints",
    "DivergedError",
    "Goodput",
    "HostOffload",
    "LossFunction",
    "MetricsLog",
    "Monitor",
    "Optimizer",
    "OptimizerName",
    "OptimizerSpec",
    "Precompiled",
    "ProfiledSteps",
    "Records",
    "Schedule",
    "StallWatch",
    "Step",
    "StepObjective",
    "StepSpec",
    "TrainState",
    "TrainingData",
    "Transformation",
    "Unit",
    "adamw",
    "best_evaluation",
    "build_step",
    "chunked_cross_entropy",
    "compile_before_run",
    "create_state",
    "dpo_loss",
    "dpo_objective",
    "evaluation",
    "host_offload",
    "init_state",
    "jit_eval_step",
    "jit_train_step",
    "keep_compiled_programs",
    "language_model_loss",
    "language_model_metrics",
    "language_model_objective",
    "learning_rate_schedule",
    "mean_metrics",
    "optimizer",
    "peak_memory_bytes",
    "perplexity",
    "place_step",
    "plot_losses",
    "precompile",
    "seq2seq_loss",
    "seq2seq_metrics",
    "seq2seq_objective",
    "split",
    "token_log_probabilities",
    "token_losses",
    "train",
    "train_step",
    "unchanged_batch",
    "with_reference",
    "without_adapter",
]
