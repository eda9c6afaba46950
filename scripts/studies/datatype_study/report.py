"""Write the report of a study: its page, plots and JSON, for the cells that are finished."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.load import default_dtype
from qlora_jax.evaluate import Prompts
from qlora_jax.models import ParameterMapping
from qlora_jax.quant import Quantization
from scripts.benchmarks import page
from scripts.benchmarks.workers import device
from scripts.studies.datatype_study import plots, sections
from scripts.studies.datatype_study.journal import Journal
from scripts.studies.datatype_study.summary import (
    DENSE,
    Step,
    Storage,
    difference,
    key_of,
    order,
    paper_order,
    storage_of,
    verdict,
)
from scripts.studies.datatype_study.texts import Texts
from scripts.studies.datatype_study.weights import bits_per_parameter

PEER_BLOCK = 64  # block size that transformers uses with bitsandbytes
LIMIT = 1e-3  # largest difference of a loss from that of the peer


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that is read before the weights, and the journal."""

    checkpoint: Checkpoint
    parameter_mappings: tuple[ParameterMapping, ...]
    texts: Texts
    prompts: Prompts | None
    asked: str
    method: dict[str, Any]
    journal: Journal


def write(
    study: Study,
    wanted: Sequence[Quantization | None],
    *,
    block_sizes: Sequence[int],
    folder: Path,
    target: Path,
    peer: bool,
) -> dict[str, Any]:
    """Write report.json, the page and its plots, print them, and return the summary for the last line.

    Args:
        wanted: the cells of the grid; those that are finished are reported.
        block_sizes: block sizes of the grid; the first is plotted.
        target: file of the page.
        peer: whether to include the losses of bitsandbytes.
    """
    rows, predicted = study.journal.rows, study.texts.predicted
    shapes = [study.checkpoint.shapes[name] for key in study.parameter_mappings for name in key.names()]
    grid = [how for how in wanted if key_of(how) in rows]
    width = 8.0 * np.dtype(default_dtype()).itemsize
    storages = [
        storage_of(how, rows, predicted, (width, width) if how is None else bits_per_parameter(shapes, how)) for how in grid
    ]
    quantized = [storage for storage in storages if storage.how is not None]
    first = block_sizes[0]
    plotted = [storage for storage in quantized if storage.how is not None and storage.how.block_size == first]
    double = any(storage.how.double_quantization for storage in plotted if storage.how is not None)
    of_first = [s.key for s in plotted if s.how is not None and s.how.double_quantization == double]
    steps, papers = order(of_first, rows, predicted), paper_order(first, rows, predicted)
    costs = [cost for how in grid if how is not None and (cost := of_double(how, rows, predicted)) is not None]
    beside_ours = beside_peer(rows, predicted) if peer else None

    made = [sections.perplexities(storages, image(target, "perplexity"))]
    plots.draw_perplexities(plotted, beside(target, "perplexity"))
    made.append(sections.orders(steps, papers, first))
    if costs:
        made.append(sections.double_quantisation(costs))
    if len(block_sizes) > 1:
        made.append(sections.block_sizes(storages, image(target, "blocks")))
        plots.draw_block_sizes(quantized, beside(target, "blocks"))
    if study.prompts is not None:
        made.append(sections.accuracies(storages, study.asked))
    errors = {key: rows[key]["errors"] for key in of_first}
    if errors:
        made.append(sections.errors(errors, image(target, "layers")))
        plots.draw_layers(errors, rows["normality"], beside(target, "layers"))
    made.append(sections.normality(rows["normality"]))
    if beside_ours is not None:
        made.append(sections.peer(beside_ours["kinds"], LIMIT, beside_ours["versions"]))
    left = len(wanted) - len(grid)
    machine = {**device(), "device": jax.devices()[0].device_kind}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "scipy")}
    versions["python"] = platform.python_version()
    seconds = sum(rows[key_of(how)]["seconds"] for how in grid)
    described = sections.method(study.method, study.texts, machine, versions, left, seconds)
    page.write(target, [described, *made], page.command_line("studies/datatypes.py"), "Data types")
    for section in made:
        print(page.text(section), flush=True)
    summary = {
        "method": study.method,
        "device": machine,
        "versions": versions,
        "seconds": seconds,
        "cells_left": left,
        "storages": [as_json(storage) for storage in storages],
        "order": sections.as_values(steps),
        "paper_order": sections.as_values(papers),
        "double_quantization": sections.as_values(costs),
        "peer": beside_ours,
        "page": str(target),
    }
    details = {"errors": {s.key: rows[s.key]["errors"] for s in quantized}, "normality": rows["normality"]}
    (folder / "report.json").write_text(json.dumps({**summary, **details}, indent=1), encoding="utf-8")
    return summary


def of_double(how: Quantization, rows: dict[str, Any], predicted: np.ndarray) -> Step | None:
    """Return what double quantisation adds to a storage that was measured without it."""
    plain, double = key_of(how), key_of(dataclasses.replace(how, double_quantization=True))
    if how.double_quantization or double not in rows:
        return None
    added = difference(double, plain, rows, predicted)
    return Step(plain, double, added, verdict(added))


def beside_peer(rows: dict[str, Any], predicted: np.ndarray) -> dict[str, Any]:
    """Return the differences of our losses from those of bitsandbytes, for the kinds that were measured by both."""
    kinds = {}
    for kind, theirs in rows["peer"]["losses"].items():
        name, _, double = kind.partition("-")
        key = DENSE if kind == DENSE else key_of(Quantization(name, PEER_BLOCK, double == "double"))
        if key not in rows:
            continue
        ours, in_eval = rows[key]["losses"], rows["peer"]["losses_in_eval"].get(kind)
        apart = (np.asarray(ours) - np.asarray(theirs)).sum() / predicted.sum()
        kinds[kind] = {
            "ours": float(np.sum(ours) / predicted.sum()),
            "theirs": float(np.sum(theirs) / predicted.sum()),
            "difference": float(apart),
            "largest_of_a_text": float((np.abs(np.asarray(ours) - theirs) / predicted).max()),
            "in_eval": None if in_eval is None else float(np.sum(in_eval) / predicted.sum()),
            "equal": bool(abs(apart) <= LIMIT),
        }
    return {"kinds": kinds, "versions": rows["peer"]["versions"], "limit": LIMIT}


def as_json(storage: Storage) -> dict[str, Any]:
    """Return a storage with its intervals as plain values."""
    return {name: value for name, value in dataclasses.asdict(storage).items() if value is not None}


def beside(target: Path, name: str) -> Path:
    """Return the file of a plot."""
    return target.with_name(f"{target.stem}-{name}.png")


def image(target: Path, name: str) -> str:
    """Return the Markdown of a plot."""
    return f"![{name}]({beside(target, name).name})"
