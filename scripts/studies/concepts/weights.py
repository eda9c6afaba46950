"""Pictures of weights: the codebook, double quantisation, and the merge of an adapter."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.quant import dequantize, quantize
from qlora_jax.quant.codebooks import SCALE_BLOCK_SIZE, codebook
from scripts.studies.concepts.style import COLORS, figure, save

__all__ = ["draw_codebook", "draw_double_quantisation", "draw_merge"]

BLOCK = 64


def draw_codebook(w: np.ndarray, path: Path) -> None:
    """Draw the distribution of the scaled weights of a matrix `[out, in]`, and the 16 values of NF4 and of int4 below it."""
    blocks = w.reshape(-1, BLOCK)
    scaled = (blocks / np.abs(blocks).max(1, keepdims=True)).reshape(-1)
    fig, (top, bottom) = figure(2, 1, height=3.2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    top.hist(scaled, bins=101, range=(-1, 1), density=True, color=COLORS[0], alpha=0.6)
    for value in codebook("nf4"):
        top.axvline(value, color=COLORS[1], linewidth=0.8)
    top.set(
        ylabel="density", title="Weights divided by the largest magnitude of their block of 64; lines: the values of NF4"
    )
    for row, (name, color) in enumerate((("int4", COLORS[2]), ("nf4", COLORS[1]))):
        values = np.unique(codebook(name))
        bottom.plot(values, np.full(values.size, row), "|", color=color, markersize=12, markeredgewidth=1.5)
    bottom.set(yticks=(0, 1), yticklabels=("int4", "NF4"), ylim=(-0.6, 1.6), xlabel="scaled weight")
    save(fig, path)


def draw_double_quantisation(w: np.ndarray, path: Path) -> None:
    """Draw the block maxima of a matrix `[out, in]` before and after double quantisation, and the bits of a parameter."""
    absmax = np.abs(w.reshape(-1, BLOCK)).max(1)
    stored = _scales(w)
    fig, (left, right) = figure(1, 2, height=3.0)
    left.plot([0, absmax.max()], [0, absmax.max()], color="grey", linewidth=0.8)
    left.plot(absmax, stored, ".", markersize=1.5, color=COLORS[0], rasterized=True)
    left.set(xlabel="largest magnitude of a block", ylabel="the same from 8 bits", title="Scales of one matrix")
    single, double = 32 / BLOCK, 8 / BLOCK + 32 / (BLOCK * SCALE_BLOCK_SIZE)
    for row, (label, bits) in enumerate((("float32 scales", single), ("double quantisation", double))):
        right.barh(row, 4, color=COLORS[0])
        right.barh(row, bits, left=4, color=COLORS[1])
        right.text(4 + bits + 0.02, row, f"{4 + bits:.3f}", va="center")
        right.text(2, row, label, va="center", ha="center", color="white")
    right.set(yticks=(), xlabel="bits of a parameter: codes and scales", xlim=(0, 5.6), title="Memory")
    save(fig, path)


def _scales(w: np.ndarray) -> np.ndarray:
    """Return the block maxima of a matrix `[out, in]` as double quantisation stores them, `[blocks]`."""
    q = quantize(jnp.asarray(w.T), "nf4", block_size=BLOCK)
    values = np.asarray(dequantize(q)).T.reshape(-1, BLOCK)
    return np.abs(values).max(1)  # the largest magnitude of a block has the code of ±1


def draw_merge(path: Path) -> None:
    """Draw a merge: W, the product of B and A that training found, and their sum, as pictures of matrices."""
    random = np.random.default_rng(0)
    w = random.normal(size=(32, 32))
    a, b = random.normal(size=(3, 32)), random.normal(size=(32, 3))
    change = 0.35 * b @ a
    parts = (
        (w, "W, frozen\n32 × 32"),
        (b, "B\n32 × 3"),
        (a, "A\n3 × 32"),
        (change, "α/r · B A\n32 × 32"),
        (w + change, "merged\n32 × 32"),
    )
    fig, axes = figure(1, len(parts), height=2.0, gridspec_kw={"width_ratios": [32, 6, 32, 32, 32]})
    for axis, (matrix, title) in zip(axes, parts, strict=True):
        axis.imshow(matrix, cmap="RdBu", vmin=-3, vmax=3, aspect="equal")
        axis.set(xticks=(), yticks=())
        axis.set_title(title, fontsize=8)
    save(fig, path)
