"""Training as pure functions of explicit state: loss, optimizers, step, and the loop around them."""

from qlora_jax.errors import DivergedError
from qlora_jax.train.dpo import PAIRS, dpo_loss, with_reference, without_adapter
from qlora_jax.train.log import MetricsLog, best_evaluation, peak_memory_bytes, perplexity, plot_losses
from qlora_jax.train.loop import BatchSource, Cadence, Watch, mean_metrics, train
from qlora_jax.train.loss import (
    chunked_cross_entropy,
    language_model_loss,
    language_model_metrics,
    seq2seq_loss,
    seq2seq_metrics,
    token_losses,
)
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
from qlora_jax.train.precompile import Ahead, compile_ahead
from qlora_jax.train.step import (
    TOKENS,
    LossFunction,
    TrainState,
    Transformation,
    Unit,
    compiled_first,
    create_state,
    init_state,
    jit_eval_step,
    jit_train_step,
    split,
    train_step,
)

__all__ = [
    "OPTIMIZERS",
    "PAIRS",
    "SCHEDULES",
    "TOKENS",
    "Ahead",
    "BatchSource",
    "Cadence",
    "DivergedError",
    "HostOffload",
    "LossFunction",
    "MetricsLog",
    "Optimizer",
    "OptimizerName",
    "Schedule",
    "TrainState",
    "Transformation",
    "Unit",
    "Watch",
    "adamw",
    "best_evaluation",
    "chunked_cross_entropy",
    "compile_ahead",
    "compiled_first",
    "create_state",
    "dpo_loss",
    "host_offload",
    "init_state",
    "jit_eval_step",
    "jit_train_step",
    "language_model_loss",
    "language_model_metrics",
    "learning_rate_schedule",
    "mean_metrics",
    "optimizer",
    "peak_memory_bytes",
    "perplexity",
    "plot_losses",
    "seq2seq_loss",
    "seq2seq_metrics",
    "split",
    "token_losses",
    "train",
    "train_step",
    "with_reference",
    "without_adapter",
]
