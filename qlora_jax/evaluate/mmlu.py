"""MMLU: the letter A, B, C or D that a model finds most likely after "Answer:", as in the QLoRA paper (section 5.2).

    prediction = argmax over the four letters of the logits at the last position of the prompt
    score      = mean over the subjects of the share of correct predictions      (subjects differ in size)

No letter is generated and no loss is computed: there is one forward pass, and logits of the last position only.

The tokens of the letters. The text after "Answer:" is " A", which a tokenizer encodes either as one token that includes the
space, or as a space and a letter. So "Answer: A" to "Answer: D" are encoded completely. Their common tokens belong to the
prompt, and the four tokens that differ are the letters. (The QLoRA authors' program uses the token of "A" alone. With
LLaMA's tokenizer this is the same; with byte-level tokenizers, as in Llama 3 and many others, this token never follows
"Answer:".)

If a prompt is too long, its last examples are removed, as in Hendrycks' program, but never a part of the question. (The
QLoRA authors' program truncates the end of the prompt, which is the question.) Questions that are too long without examples
are skipped and counted.

Shapes. Prompts are padded to few lengths (lengths.py): at most five programs are compiled for up to 2,048 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx

from qlora_jax.errors import DataError
from qlora_jax.evaluate.choices import choice_logits
from qlora_jax.evaluate.questions import LETTERS, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """Tokenized questions.

    Attributes:
        tokens: int32 `[t_i]`, the token ids of each prompt.
        subjects: the subject of each prompt.
        answers: the correct answer of each prompt, 0 to 3.
        letters: the token ids of A, B, C and D.
        shortened: number of prompts from which examples were removed.
        left_out: number of questions that were skipped because they are too long without examples.
    """

    tokens: tuple[np.ndarray, ...]
    subjects: tuple[str, ...]
    answers: tuple[int, ...]
    letters: tuple[int, ...]
    shortened: int
    left_out: int

    def __str__(self) -> str:
        text = f"{len(self.tokens):,} prompts of up to {max(map(len, self.tokens)):,} tokens"
        if self.shortened:
            text += f"; {self.shortened:,} with fewer examples, for length"
        return text + (f"; {self.left_out:,} questions left out, too long without examples" if self.left_out else "")


@dataclass(frozen=True)
class Scores:
    """The numbers of correct answers and of all answers by subject."""

    right: dict[str, int]
    counts: dict[str, int]

    @property
    def by_subject(self) -> dict[str, float]:
        """The share of correct answers of each subject."""
        return {subject: self.right[subject] / count for subject, count in self.counts.items()}

    @property
    def accuracy(self) -> float:
        """The mean share of correct answers over the subjects."""
        return float(np.mean(list(self.by_subject.values())))

    def metrics(self) -> dict[str, float]:
        """Return the metrics for a log: `mmlu_accuracy`, and `mmlu_accuracy_<subject>` for each subject."""
        return {"mmlu_accuracy": self.accuracy} | {
            f"mmlu_accuracy_{subject}": accuracy for subject, accuracy in self.by_subject.items()
        }


def encode_questions(questions: Sequence[Question], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Prompts:
    """Tokenize questions to prompts of at most `max_length` tokens, as the module's docstring describes.

    Raises:
        DataError: the tokenizer has no separate token for each letter, a letter cannot follow a prompt, or every question is
            too long.
    """
    letters = _letters(tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # A letter is appended to find the tokens of the prompt, and removed below.
        rows = cast(list[list[int]], tokenizer([f"{text} {LETTERS[0]}" for text in texts], verbose=False)["input_ids"])
        rows = [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
        for text, row in zip(texts, rows, strict=True):
            if not row or row[-1] != letters[0]:
                raise DataError(f"expected a prompt that a letter can follow, like '… Answer:', found {text[-60:]!r}")
        return [row[:-1] for row in rows]

    shots = [len(question.examples) for question in questions]
    encoded = encode([question.prompt() for question in questions])
    while long := [i for i, row in enumerate(encoded) if len(row) > max_length and shots[i] > 0]:
        for index in long:
            shots[index] -= 1
        for index, row in zip(long, encode([questions[i].prompt(shots[i]) for i in long]), strict=True):
            encoded[index] = row
    fitting = [index for index, row in enumerate(encoded) if len(row) <= max_length]
    if not fitting:
        raise DataError(f"MMLU: expected questions of at most {max_length} tokens, found none; all are longer")
    return Prompts(
        tokens=tuple(np.asarray(encoded[index], np.int32) for index in fitting),
        subjects=tuple(questions[index].subject for index in fitting),
        answers=tuple(questions[index].answer for index in fitting),
        letters=letters,
        shortened=sum(shots[index] < len(questions[index].examples) for index in fitting),
        left_out=len(encoded) - len(fitting),
    )


def evaluate_mmlu(
    graphdef: nnx.GraphDef[Any], state: Any, prompts: Prompts, *, batch_size: int = 8, progress: bool = False
) -> Scores:
    """Return the scores of a model.

    Args:
        graphdef, state: `nnx.split` of a `LanguageModel`.
        prompts: the tokenized questions.
        batch_size: number of rows in a batch. In the context of a mesh (`jax.set_mesh(data_mesh())`) the rows are split over
            its devices, and their number is rounded up to a multiple of the devices.
        progress: whether to show a progress bar.
    """
    predictions = letter_logits(graphdef, state, prompts, batch_size=batch_size, progress=progress).argmax(1)
    right: dict[str, int] = {}
    counts: dict[str, int] = {}
    for subject, answer, prediction in zip(prompts.subjects, prompts.answers, predictions.tolist(), strict=True):
        right[subject] = right.get(subject, 0) + (answer == prediction)
        counts[subject] = counts.get(subject, 0) + 1
    return Scores(right, counts)


def letter_logits(
    graphdef: nnx.GraphDef[Any], state: Any, prompts: Prompts, *, batch_size: int = 8, progress: bool = False
) -> np.ndarray:
    """Return the logits of A, B, C and D after each prompt, float32 `[n, 4]`; see `evaluate_mmlu` for the arguments."""
    return choice_logits(
        graphdef, state, prompts.tokens, prompts.letters, batch_size=batch_size, progress="MMLU" if progress else None
    )


def _letters(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    texts = [f"Answer: {letter}" for letter in LETTERS]
    rows = cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])
    letters = tuple(row[-1] for row in rows)
    if len({tuple(row[:-1]) for row in rows}) != 1 or len(set(letters)) != len(LETTERS):
        raise DataError(f"tokenizer: expected 'Answer: A' to 'Answer: D' to differ in their last tokens alone, found {rows}")
    return letters
