"""The report of a study as sections of a page."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.evaluate import share_interval
from qlora_jax.quant import Quantization
from scripts.benchmarks.page import Section
from scripts.studies.datatype_study.summary import Step, Storage, by_kind, key_of
from scripts.studies.datatype_study.texts import Texts

Errors = dict[str, dict[str, Any]]


def method(
    study: dict[str, Any], texts: Texts, machine: dict[str, Any], versions: dict[str, str], left: int, seconds: float
) -> Section:
    """What was measured, on what, by what."""
    counts = ", ".join(f"{count} of {name}" for name, count in study["texts"].items())
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    sentences = (
        f"{study['model']}, linear layers in each data type, everything else dense, computed in {study['dtype']}. "
        f"{len(texts.tokens)} texts ({counts}), drawn with seed {study['seed']}, of at most {study['length']} tokens: "
        f"{study['tokens']:,} tokens are predicted.",
        f"Device: {machine['device']} ({machine['cpu']}, {machine['cores']} cores); {named}. The cells took "
        f"{seconds / 60:.1f} minutes; load average at the end {machine['load_average'][0]:.1f}.",
    )
    if left:
        sentences += (f"{left} cells of the grid have not been measured yet: the same command goes on.",)
    return Section("Method", sentences, (), ())


def perplexities(storages: Sequence[Storage], image: str) -> Section:
    """Every storage in the order of the grid."""
    rows = [
        (
            storage.key,
            f"{storage.bits:.3f}",
            f"{storage.stored:.3f}",
            f"{storage.error:.4f}",
            storage.log_perplexity.text(),
            f"{math.exp(storage.log_perplexity.value):.5g}",
            "" if storage.added is None else storage.added.text(sign=True),
        )
        for storage in storages
    ]
    return Section(
        "Perplexity",
        (
            "Log-perplexity: the mean over texts of a text's mean loss a token, with the 95 % interval of Student's t; "
            "the perplexity is its exponential. The last column is the mean of the differences to dense weights on the "
            "same texts: texts differ more than data types, and what they share cancels there. bits: that codes and "
            "scales need a parameter of the linear layers; stored: what they take here, where codes of 2 and 3 bits lie "
            "in slots of 4. error: the root mean square of the relative errors of all matrices.",
        ),
        ("type-block", "bits", "stored", "error", "log-perplexity", "perplexity", "added to dense"),
        tuple(rows),
        (image,),
    )


def orders(by_mean: Sequence[Step], papers: Sequence[Step], block_size: int) -> Section:
    """From the best type to the worst, and the paper's order."""
    after = (
        "Each row is a type and the one before it; the interval is that of their paired differences, and speaks of other "
        "texts of the same kind, on this model alone.",
    )
    if papers:
        confirmed = sum(step.verdict == "worse" for step in papers)
        shown = "; ".join(
            f"{step.after} against {step.before}: {step.verdict} ({step.added.text(sign=True)})" for step in papers
        )
        after += (
            f"The paper's order of mean perplexity (Table 2: NF4 + DQ 27.41, FP4 E3M0 29.48, FP4 E2M1 31.07, Int4 34.34): "
            f"{confirmed} of its {len(papers)} steps are found here too. {shown}.",
        )
    rows = [(by_mean[0].before, "", "the best")] if by_mean else []
    rows += [(step.after, step.added.text(sign=True), step.verdict) for step in by_mean]
    title = f"The order at blocks of {block_size}, with double quantisation where it was measured"
    return Section(title, (), ("type", "added to the one before", "which is"), tuple(rows), after)


def double_quantisation(steps: Sequence[Step]) -> Section:
    """What quantising the scales costs."""
    rows = tuple((step.before, step.added.text(5, sign=True), step.verdict) for step in steps)
    before = ("What double quantisation adds to the log-perplexity of the same type and block size, paired.",)
    return Section("Double quantisation", before, ("type-block", "added", "which is"), rows)


def block_sizes(storages: Sequence[Storage], image: str) -> Section:
    """What each type adds, by block size."""
    of = {storage.key: storage for storage in storages}
    hows = [storage.how for storage in storages if storage.how is not None]
    sizes = sorted({how.block_size for how in hows})
    kinds = list(dict.fromkeys((how.data_type, how.double_quantization) for how in hows))

    def cell(name: Any, double: bool, size: int) -> str:
        found = of.get(key_of(Quantization(name, size, double)))
        return "" if found is None or found.added is None else f"{found.added.value:+.4f} ({found.bits:.2f} bits)"

    rows = tuple(
        (f"{name}{', double' if double else ''}", *(cell(name, double, size) for size in sizes)) for name, double in kinds
    )
    before = ("Log-perplexity added to dense weights, and the bits that are needed a parameter.",)
    return Section("Block sizes", before, ("type", *map(str, sizes)), rows, (image,))


def accuracies(storages: Sequence[Storage], asked: str) -> Section:
    """Right answers without examples."""
    rows = [
        (
            storage.key,
            storage.accuracy.text(3),
            "" if storage.added_accuracy is None else storage.added_accuracy.text(3, sign=True),
            "" if storage.letters is None else storage.letters.text(),
            "" if storage.added_letters is None else storage.added_letters.text(sign=True),
        )
        for storage in storages
        if storage.accuracy is not None
    ]
    dense = next((storage.accuracy for storage in storages if storage.how is None), None)
    after: tuple[str, ...] = ()
    if dense is not None and dense.low <= 0.25 <= dense.high:
        after = (
            "The dense model itself cannot be told from guessing (0.25): its accuracy says nothing of data types, and the "
            "log loss of the right letter little.",
        )
    return Section(
        "Zero-shot accuracy",
        (
            f"{asked}. The answer is the likeliest of the four letters after the prompt. Accuracy is the share of right "
            f"answers of all questions, with Wilson's interval; the log loss is that of the right letter among the four, "
            f"log 4 = 1.386 for guessing. Differences are paired, question by question.",
        ),
        ("type-block", "accuracy", "added to dense", "log loss", "added to dense"),
        tuple(rows),
        after,
    )


def errors(of_types: dict[str, Errors], image: str) -> Section:
    """Relative errors by type and kind of matrix."""
    kinds = list(by_kind(next(iter(of_types.values()))))
    rows = []
    for key, found in of_types.items():
        values = [[matrix["rms"] for matrix in matrices] for matrices in by_kind(found).values()]
        largest = max(matrix["largest"] for matrix in found.values())
        spread = [f"{np.mean(one):.4f} ({min(one):.4f}–{max(one):.4f})" for one in values]
        rows.append((key, *spread, f"{largest:.2f}"))
    before = (
        "√(Σ error² / Σ weight²) of a matrix: the mean over layers (and the least and the most), by kind. largest: the "
        "largest error of a weight, over the root mean square of its matrix. Every matrix is in the JSON report.",
    )
    return Section("Quantisation error", before, ("type-block", *kinds, "largest"), tuple(rows), (image,))


def normality(found: dict[str, dict[str, Any]]) -> Section:
    """Shapiro and Wilk's test by kind of matrix."""
    rows = []
    for kind, matrices in by_kind(found).items():
        tested = sum(matrix["units"] for matrix in matrices)
        rejected = sum(matrix["rejected_units"] for matrix in matrices)
        share = share_interval(np.arange(tested) < rejected)
        w = [matrix["w"] for matrix in matrices]
        small = sum(matrix["p"] < 0.05 for matrix in matrices)
        rows.append(
            (
                kind,
                f"{np.median(w):.4f} ({min(w):.4f}–{max(w):.4f})",
                f"{small} of {len(matrices)}",
                share.text(3),
                f"{tested:,}",
            )
        )
    samples = sorted({matrix["sample"] for matrix in found.values()})
    size = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
    after: tuple[str, ...] = ()
    counts = [matrix["distinct"] for matrix in found.values() if matrix["distinct"] is not None]
    if counts and max(counts) <= 16:
        after = (
            f"These weights have been in few bits before: no block of 32 neighbours among those looked at holds more than "
            f"{max(counts)} distinct values (continuous weights would have about 32). So the dense model is itself a "
            f"dequantised one: errors and tests are those of such weights, and a type whose grid is like theirs has an "
            f"advantage that it would not have on weights as they were trained.",
        )
    return Section(
        "Normality",
        (
            f"Shapiro and Wilk's test by scipy. W and p < 0.05 are those of {size} values drawn from the whole matrix, "
            f"whose units differ in scale; units are rows of it, the incoming weights of one output, each tested by "
            f"itself as in the paper's appendix F (7.5 % rejected there); of normal weights 5 % would be rejected.",
        ),
        ("matrix", "W, median over layers", "p < 0.05", "units rejected", "units"),
        tuple(rows),
        after,
    )


def peer(kinds: dict[str, dict[str, float]], limit: float, versions: dict[str, str]) -> Section:
    """The losses beside those of bitsandbytes."""
    rows = tuple(
        (
            kind,
            f"{found['ours']:.6f}",
            f"{found['theirs']:.6f}",
            f"{found['difference']:+.1e}",
            f"{found['largest_of_a_text']:.1e}",
            "" if found["in_eval"] is None else f"{found['in_eval'] - found['theirs']:+.1e}",
            "yes" if found["equal"] else "NO",
        )
        for kind, found in kinds.items()
    )
    return Section(
        "Against bitsandbytes",
        (
            "The mean loss a token over all texts, of the model as transformers and bitsandbytes quantise and run it ("
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f"), in float32, blocks of 64, on the same tokens; equal: within {limit:g}. eval: what bitsandbytes' own "
            f"path for inference, in bfloat16 on a CPU that has AVX512-BF16, adds to its own figure.",
        ),
        ("type", "ours", "bitsandbytes", "difference", "largest of a text", "eval", "equal"),
        rows,
    )


def said(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Steps for JSON."""
    return [{**vars(step), "added": vars(step.added)} for step in steps]
