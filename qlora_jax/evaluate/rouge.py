"""RougeL, the metric of the QLoRA paper for T5 on Super-NaturalInstructions.

The score of an answer is 100 times the F-measure of the longest common subsequence of stemmed words. Google's rouge-score
package splits and stems the words, as in the benchmark's own evaluation.
"""

from collections.abc import Sequence

from qlora_jax.errors import DataError


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean RougeL, 0 to 100, of answers with one reference each.

    Raises:
        DataError: no answers, or different numbers of answers and references.
    """
    # Imported here, because the import of this package is slow.
    from rouge_score.rouge_scorer import RougeScorer

    if not answers or len(answers) != len(references):
        raise DataError(f"RougeL: expected as many references as answers, found {len(references)} and {len(answers)}")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score(target=reference, prediction=answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)
