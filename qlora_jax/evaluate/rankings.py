"""Rankings of models that one judge's scores and verdicts imply, and how far two rankings agree.

least squares    θ minimises Σ (θ_a - θ_b - d)² over all judgements of two answers, where d is the difference of their
                 scores, or of their points (Massey 1997). A model that was compared with strong models only is
                 not ranked lower for it; where all are compared with one reference, θ is the mean difference from it
Kendall's τ_b    (concordant - discordant pairs) / √(pairs untied in one ranking · pairs untied in the other) (Kendall 1945)
"""

from collections.abc import Sequence

import numpy as np

from qlora_jax.evaluate.judgements import Judgements

__all__ = ["difference_sums", "kendall_tau", "least_squares", "reachable"]


def difference_sums(valid: Judgements, models: Sequence[str], questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums that `least_squares` takes, for each question; judgements of other models do not count.

    Returns:
        number of judgements of each pair, float64 `[questions, models, models]`, symmetric, and the sum of each model's
        differences from the others, float64 `[questions, models]`.
    """
    model_at = {name: index for index, name in enumerate(models)}
    question_at = {name: index for index, name in enumerate(questions)}
    to_model = np.array([model_at.get(name, -1) for name in valid.models])
    question = np.array([question_at.get(name, -1) for name in valid.questions])[valid.question]
    first, second = to_model[valid.first], to_model[valid.second]
    kept = (question >= 0) & (first >= 0) & (second >= 0)
    question, first, second = question[kept], first[kept], second[kept]
    difference = valid.values[kept, 0] - valid.values[kept, 1]
    counts = np.zeros((len(questions), len(models), len(models)))
    sums = np.zeros((len(questions), len(models)))
    for a, b, sign in ((first, second, 1.0), (second, first, -1.0)):
        np.add.at(counts, (question, a, b), 1.0)
        np.add.at(sums, (question, a), sign * difference)
    return counts, sums


def least_squares(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the least-squares ratings float64 `[n, models]` of n sets of judgements.

    Args:
        counts, sums: the numbers of judgements `[n, models, models]` and the sums of differences `[n, models]`.

    Returns:
        The ratings, rounded to 9 digits so that equal ones are tied. NaN: a model without judgements, and all models of
        a set in which the judgements do not connect them.
    """
    models = counts.shape[-1]
    degree = counts.sum(-1)
    idle = degree == 0
    # A matrix of ones keeps the sum of the ratings, which is free, at 0.
    laplacian = (degree + idle)[:, :, None] * np.eye(models) - counts + 1.0
    connected = (reachable(counts) | idle[:, :, None] | idle[:, None, :]).all((1, 2))
    ratings = np.full(sums.shape, np.nan)
    ratings[connected] = np.linalg.solve(laplacian[connected], sums[connected][:, :, None])[:, :, 0]
    return np.where(idle, np.nan, np.round(ratings, 9))


def reachable(edges: np.ndarray) -> np.ndarray:
    """Return whether there is a path from each node to each other along positive edges, bool `[n, nodes, nodes]`."""
    paths = (edges > 0) | np.eye(edges.shape[-1], dtype=bool)
    for _ in range(int(edges.shape[-1]).bit_length()):
        paths = paths.astype(np.float64) @ paths.astype(np.float64) > 0
    return paths


def kendall_tau(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Kendall's τ_b of the last axes `[…, n]`, NaN where a ranking is all ties; values that are NaN are left out."""
    above = np.triu_indices(x.shape[-1], 1)
    signs = [np.sign(values[..., above[0]] - values[..., above[1]]) for values in (x, y)]
    both = ~np.isnan(signs[0]) & ~np.isnan(signs[1])
    a, b = (np.where(both, sign, 0.0) for sign in signs)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
