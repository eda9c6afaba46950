"""Evaluation of models: perplexity, MMLU, RougeL, judgements of their answers, and confidence intervals of the results.

prompt_file.py and answer_file.py read questions and hold the answers of models to them.
documents.py reads the texts of which perplexity.py measures the perplexity; likelihood.py scores their tokens.
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
from qlora_jax.evaluate.answer_file import AnswerFile
from qlora_jax.evaluate.bradley_terry import BradleyTerry, bradley_terry, fit_bradley_terry
from qlora_jax.evaluate.comparison import Change, Measured, Share, change_of, judged_points, value_of, verdict_of
from qlora_jax.evaluate.documents import Document, documents_of, read_documents
from qlora_jax.evaluate.elo import Elo, check_elo, elo_ratings
from qlora_jax.evaluate.intervals import Interval, mean_interval, paired_difference, share_interval
from qlora_jax.evaluate.judgements import Judgements, Kind, notes_on_pairs, read_judgements
from qlora_jax.evaluate.lengths import padded_batches
from qlora_jax.evaluate.likelihood import TokenScores, token_scores
from qlora_jax.evaluate.mmlu import Prompts, Scores, encode_questions, evaluate_mmlu, letter_logits
from qlora_jax.evaluate.perplexity import Perplexity, compare_perplexities, evaluate_perplexity, sliding_windows
from qlora_jax.evaluate.prompt_file import Prompt, read_prompts
from qlora_jax.evaluate.questions import LETTERS, Question, QuestionSet, read_questions
from qlora_jax.evaluate.rankings import kendall_tau
from qlora_jax.evaluate.relative_scores import RelativeScore, models_without_scores, reference_of, relative_scores
from qlora_jax.evaluate.rouge import rouge_l

__all__ = [
    "LETTERS",
    "AnswerFile",
    "BradleyTerry",
    "Change",
    "Document",
    "Elo",
    "Interval",
    "Judgements",
    "Kind",
    "Measured",
    "PairAgreement",
    "Perplexity",
    "Prompt",
    "Prompts",
    "Question",
    "QuestionSet",
    "RelativeScore",
    "Scores",
    "SelfAgreement",
    "Share",
    "TokenScores",
    "bradley_terry",
    "change_of",
    "check_elo",
    "compare_perplexities",
    "documents_of",
    "elo_ratings",
    "encode_questions",
    "evaluate_mmlu",
    "evaluate_perplexity",
    "fit_bradley_terry",
    "fleiss_kappa",
    "judged_points",
    "kappa_of_judges",
    "kendall_tau",
    "letter_logits",
    "mean_interval",
    "models_without_scores",
    "notes_on_pairs",
    "padded_batches",
    "pair_agreement",
    "paired_difference",
    "read_documents",
    "read_judgements",
    "read_prompts",
    "read_questions",
    "reference_of",
    "relative_scores",
    "rouge_l",
    "self_agreement",
    "share_interval",
    "sliding_windows",
    "split_by_judge",
    "token_scores",
    "value_of",
    "verdict_of",
]
