"""The sections of the page of a study."""

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
    """Describe what was measured, and on which machine."""
    counts = ", ".join(f"{count} of {name}" for name, count in study["texts"].items())
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    sentences = (
        f"The linear layers of {study['model']} are stored in each data type in turn. Everything else is dense, and the "
        f"computation is in {study['dtype']}. The model reads {len(texts.tokens)} texts ({counts}) of at most "
        f"{study['length']} tokens, drawn with seed {study['seed']}, and predicts {study['tokens']:,} tokens.",
        f"Device: {machine['device']} ({machine['cpu']}, {machine['cores']} cores); {named}. The measurement took "
        f"{seconds / 60:.1f} minutes; the load average at the end was {machine['load_average'][0]:.1f}.",
    )
    if left:
        sentences += (f"{left} cells of the grid have not been measured yet; the same command continues with them.",)
    return Section("Method", sentences, (), ())


def perplexities(storages: Sequence[Storage], image: str) -> Section:
    """Show the perplexity of every storage in the order of the grid."""
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
            '"log-perplexity" is the mean over texts of the mean loss per token of a text, with the 95 % interval of '
            "Student's t. The perplexity is its exponential. "
            '"added to dense" is the mean of the differences to dense weights on the same texts; its '
            "interval is narrower, because texts differ more than data types and this difference cancels. "
            '"bits" is the number of bits per parameter of the linear layers that codes and scales need. "stored" is the '
            'number that they take here, where codes of 2 and 3 bits are stored in 4 bits. "error" is the root mean square '
            "of the relative errors of all matrices.",
        ),
        ("type-block", "bits", "stored", "error", "log-perplexity", "perplexity", "added to dense"),
        tuple(rows),
        (image,),
    )


def orders(by_mean: Sequence[Step], papers: Sequence[Step], block_size: int) -> Section:
    """Show the types from the best to the worst, and the order in the paper."""
    after = (
        "Each row compares a type with the type in the row before it. The interval is that of their paired differences. It "
        "holds for other texts of the same kind, and for this model only.",
    )
    if papers:
        confirmed = sum(step.verdict == "worse" for step in papers)
        shown = "; ".join(
            f"{step.after} against {step.before}: {step.verdict} ({step.added.text(sign=True)})" for step in papers
        )
        after += (
            f"The paper's order of mean perplexity (Table 2: NF4 + DQ 27.41, FP4 E3M0 29.48, FP4 E2M1 31.07, Int4 34.34): "
            f"{confirmed} of its {len(papers)} steps were found here too. {shown}.",
        )
    rows = [(by_mean[0].before, "", "the best")] if by_mean else []
    rows += [(step.after, step.added.text(sign=True), step.verdict) for step in by_mean]
    title = f"The order of the types with blocks of {block_size}, with double quantisation where it was measured"
    return Section(title, (), ("type", "added to the type before", "verdict"), tuple(rows), after)


def double_quantisation(steps: Sequence[Step]) -> Section:
    """Show what the quantisation of scales costs."""
    rows = tuple((step.before, step.added.text(5, sign=True), step.verdict) for step in steps)
    before = ('The column "added" is the paired difference that double quantisation adds to the log-perplexity of a type.',)
    return Section("Double quantisation", before, ("type-block", "added", "verdict"), rows)


def block_sizes(storages: Sequence[Storage], image: str) -> Section:
    """Show what each type adds, by block size."""
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
    before = ("Log-perplexity added to that of dense weights, and the bits per parameter.",)
    return Section("Block sizes", before, ("type", *map(str, sizes)), rows, (image,))


def accuracies(storages: Sequence[Storage], asked: str) -> Section:
    """Show the right answers without solved examples."""
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
            "The interval of the dense model includes the accuracy of guessing (0.25). Its accuracy therefore says "
            "nothing about data types, and the log loss of the correct letter says little.",
        )
    return Section(
        "Zero-shot accuracy",
        (
            f"{asked}. The model's answer is the most likely of the four letters after the prompt. "
            '"accuracy" is the share of correct answers, with an interval by Wilson. "log loss" is that of the correct '
            "letter among the four; guessing gives log 4 = 1.386. Differences are paired by question.",
        ),
        ("type-block", "accuracy", "added to dense", "log loss", "added to dense"),
        tuple(rows),
        after,
    )


def errors(of_types: dict[str, Errors], image: str) -> Section:
    """Show relative errors by type and kind of matrix."""
    kinds = list(by_kind(next(iter(of_types.values()))))
    rows = []
    for key, found in of_types.items():
        values = [[matrix["rms"] for matrix in matrices] for matrices in by_kind(found).values()]
        largest = max(matrix["largest"] for matrix in found.values())
        spread = [f"{np.mean(one):.4f} ({min(one):.4f}–{max(one):.4f})" for one in values]
        rows.append((key, *spread, f"{largest:.2f}"))
    before = (
        "The error of a matrix is √(Σ error² / Σ weight²). The table shows the mean over layers, with the smallest and the "
        'largest, for each kind of matrix. "largest" is the largest error of a single weight, divided by the root mean '
        "square of its matrix. The JSON report has every matrix.",
    )
    return Section("Quantisation error", before, ("type-block", *kinds, "largest"), tuple(rows), (image,))


def normality(found: dict[str, dict[str, Any]]) -> Section:
    """Show the test of Shapiro and Wilk by kind of matrix."""
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
            "These weights were quantised before: no examined block of 32 neighbouring weights has more than "
            f"{max(counts)} distinct values (continuous weights would have about 32). The dense model is therefore a "
            "dequantised model itself. The errors and tests are those of such weights, and a data type with a similar "
            "grid has an advantage that it would not have with the weights as they were trained.",
        )
    return Section(
        "Normality",
        (
            f"The test of Shapiro and Wilk, as implemented in scipy. W and p < 0.05 are for {size} values drawn from the "
            "whole matrix, whose units differ in scale. A unit is a row of the matrix: the incoming weights of one "
            "output. Each unit is tested separately, as in appendix F of the paper, where 7.5 % were rejected. Of "
            "normally distributed units 5 % would be rejected.",
        ),
        ("matrix", "W, median over layers", "p < 0.05", "units rejected", "units"),
        tuple(rows),
        after,
    )


def peer(kinds: dict[str, dict[str, float]], limit: float, versions: dict[str, str]) -> Section:
    """Compare the losses with those of bitsandbytes."""
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
            "The mean loss per token over all texts, beside that of the model as transformers and bitsandbytes quantise "
            "and run it ("
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f'): in float32, with blocks of 64, on the same tokens. "equal" means within {limit:g}. "eval" is the loss '
            "that bitsandbytes' inference path adds to its own figure; that path computes in bfloat16 on a CPU with "
            "AVX512-BF16.",
        ),
        ("type", "ours", "bitsandbytes", "difference", "largest of a text", "eval", "equal"),
        rows,
    )


def as_values(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return steps as plain values for JSON."""
    return [{**vars(step), "added": vars(step.added)} for step in steps]
