"""Evaluation of models: MMLU, RougeL, and confidence intervals of the results."""

from qlora_jax.evaluate.intervals import Interval, mean_interval, paired_difference, share_interval
from qlora_jax.evaluate.lengths import padded_batches
from qlora_jax.evaluate.mmlu import Prompts, Scores, encode_questions, evaluate_mmlu, letter_logits
from qlora_jax.evaluate.questions import LETTERS, Question, QuestionSet, read_questions
from qlora_jax.evaluate.rouge import rouge_l

__all__ = [
    "LETTERS",
    "Interval",
    "Prompts",
    "Question",
    "QuestionSet",
    "Scores",
    "encode_questions",
    "evaluate_mmlu",
    "letter_logits",
    "mean_interval",
    "padded_batches",
    "paired_difference",
    "read_questions",
    "rouge_l",
    "share_interval",
]
