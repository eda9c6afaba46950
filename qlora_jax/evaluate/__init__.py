"""Evaluation of models: MMLU, RougeL, judgements of their answers, and confidence intervals of the results.

judgements.py reads scores and verdicts of judges; relative_scores.py, elo.py, bradley_terry.py, rankings.py and
agreement.py calculate the figures, and bootstrap.py their intervals. The packages judge and report make judgements, and one
page of everything.
"""

from qlora_jax.evaluate.agreement import (
    PairAgreement,
    SelfAgreement,
    fleiss_kappa,
    kappa_of_judges,
    pair_agreement,
    self_agreement,
    split_by_judge,
)
from qlora_jax.evaluate.bradley_terry import BradleyTerry, bradley_terry, fit_bradley_terry
from qlora_jax.evaluate.elo import Elo, check_elo, elo_ratings
from qlora_jax.evaluate.intervals import Interval, mean_interval, paired_difference, share_interval
from qlora_jax.evaluate.judgements import Judgements, Kind, notes_on_pairs, read_judgements
from qlora_jax.evaluate.lengths import padded_batches
from qlora_jax.evaluate.mmlu import Prompts, Scores, encode_questions, evaluate_mmlu, letter_logits
from qlora_jax.evaluate.questions import LETTERS, Question, QuestionSet, read_questions
from qlora_jax.evaluate.rankings import kendall_tau
from qlora_jax.evaluate.relative_scores import RelativeScore, models_without_scores, reference_of, relative_scores
from qlora_jax.evaluate.rouge import rouge_l

__all__ = [
    "LETTERS",
    "BradleyTerry",
    "Elo",
    "Interval",
    "Judgements",
    "Kind",
    "PairAgreement",
    "Prompts",
    "Question",
    "QuestionSet",
    "RelativeScore",
    "Scores",
    "SelfAgreement",
    "bradley_terry",
    "check_elo",
    "elo_ratings",
    "encode_questions",
    "evaluate_mmlu",
    "fit_bradley_terry",
    "fleiss_kappa",
    "kappa_of_judges",
    "kendall_tau",
    "letter_logits",
    "mean_interval",
    "models_without_scores",
    "notes_on_pairs",
    "padded_batches",
    "pair_agreement",
    "paired_difference",
    "read_judgements",
    "read_questions",
    "reference_of",
    "relative_scores",
    "rouge_l",
    "self_agreement",
    "share_interval",
    "split_by_judge",
]
