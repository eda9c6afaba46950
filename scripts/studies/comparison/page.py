"""Write the report of a comparison: Markdown, a picture, and one HTML page that contains everything."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from scripts.studies.comparison.intervals import Interval, difference, interval, verdict
from scripts.studies.comparison.power import Finding, finding

# Metrics of a held-out evaluation: their title, and whether lower is better. Pairs of variants are compared by the first.
METRICS = {
    "eval_loss": ("held-out loss", True),
    "eval_mean_token_accuracy": ("token accuracy", False),
    "eval_exact_match": ("exact answers", False),
    "eval_rougeL": ("RougeL", False),
}
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by variant, by seed

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border: 1px solid #ccc; padding: .3rem .6rem }
td { text-align: right } td:first-child { text-align: left } th { background: #f3f3f3 }
img { max-width: 100% } pre { overflow-x: auto }
</style>
<h1>{{ title }}</h1><p>{{ intro }}</p>
{% for caption, header, rows in tables %}<h2>{{ caption }}</h2>
<table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}<h2>Plots</h2><img alt="figures by variant" src="data:image/png;base64,{{ picture }}">
<h2>All runs</h2><details><summary>JSON</summary><pre>{{ data }}</pre></details>
</html>
"""


def shown_metrics(results: Results) -> list[str]:
    """Return the names of the metrics that all runs have."""
    runs = [run for seeds in results.values() for run in seeds.values()]
    return [name for name in METRICS if runs and all(name in run["figures"] for run in runs)]


def of_seeds(seeds: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return one metric by seed."""
    return {seed: float(run["figures"][name]) for seed, run in seeds.items()}


def main_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table with one row per variant: means over its seeds."""
    metrics = shown_metrics(results)
    header = ["variant", *(METRICS[name][0] for name in metrics)]
    header += ["trainable parameters", "checkpoint MiB", "peak memory GiB", "tokens/s", "seeds"]
    rows = []
    for variant, seeds in results.items():
        runs = list(seeds.values())

        def mean(name: str, runs: list[Mapping[str, Any]] = runs) -> Interval:
            return interval([run[name] for run in runs])

        rows.append(
            [
                variant,
                *(str(interval(list(of_seeds(seeds, name).values()))) for name in metrics),
                f"{runs[0]['trainable_parameters']:,}",
                f"{mean('checkpoint_bytes').mean / 2**20:.1f}",
                f"{max(run['peak_memory_bytes'] for run in runs) / 2**30:.2f}",
                f"{mean('tokens_per_second').mean:.0f}",
                str(len(runs)),
            ]
        )
    return header, rows


def verdict_table(results: Results, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table that compares each other variant with the baseline, by each metric."""
    metrics = shown_metrics(results)
    header = ["against " + baseline]
    for name in metrics:
        header += [f"{METRICS[name][0]}: difference", "verdict"]
    rows = []
    for variant, seeds in results.items():
        if variant == baseline:
            continue
        row = [variant]
        for name in metrics:
            change = difference(of_seeds(seeds, name), of_seeds(results[baseline], name))
            row += ["" if change is None else str(change), verdict(change, lower_is_better=METRICS[name][1])]
        rows.append(row)
    return header, rows


def findings(results: Results, baseline: str, margin: float) -> dict[tuple[str, str], Finding]:
    """Return what was found of each other variant, by variant and metric."""
    found = {}
    for variant, seeds in results.items():
        for name in shown_metrics(results) if variant != baseline else ():
            ours, theirs = of_seeds(seeds, name), of_seeds(results[baseline], name)
            one = finding(ours, theirs, margin=margin, lower_is_better=METRICS[name][1])
            if one is not None:
                found[variant, name] = one
    return found


def power_table(found: Mapping[tuple[str, str], Finding], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table of the differences that the seeds could have shown."""
    header = ["against " + baseline, "metric", "difference", "found with 80 % power", "of the baseline", "seeds"]
    rows = []
    for (variant, name), one in found.items():
        blind = math.isinf(one.detectable)
        share = "–" if blind or not one.baseline else f"{100 * one.detectable / abs(one.baseline):.2g} %"
        needed = "–" if blind else "over 1000" if one.needed is None else str(one.needed)
        row = [variant, METRICS[name][0], str(one.change), "–" if blind else f"{one.detectable:.2g}", share]
        rows.append([*row, str(one.change.count), needed, one.text()])
    return [*header, "seeds for the margin", "finding"], rows


def summary(found: Mapping[tuple[str, str], Finding], baseline: str, margin: float) -> str:
    """Return in words whether the variants equal the baseline by the first metric, and what the run could have seen."""
    if not found:
        return ""
    name = next(iter(found))[1]
    said: dict[str, list[str]] = {}
    for (variant, metric), one in found.items():
        if metric == name:
            said.setdefault(one.said, []).append(variant)
    parts = {
        "equal": f"equal to {baseline} within {100 * margin:g} %",
        "not settled": f"not told apart from {baseline}, but not shown to be equal within {100 * margin:g} % either",
        "better": f"better than {baseline}",
        "worse": f"worse than {baseline}",
    }
    sentences = [f"{', '.join(said[kind])}: {text}" for kind, text in parts.items() if kind in said]
    sizes = [one.detectable / abs(one.baseline) for (_, metric), one in found.items() if metric == name and one.baseline]
    seen = [100 * size for size in sizes if math.isfinite(size)]
    power = "one seed has no power to see any difference"
    if seen:
        low, high = f"{min(seen):.2g}", f"{max(seen):.2g}"
        power = f"it would have seen a difference of {low if low == high else f'{low} to {high}'} % in four cases of five"
    return f"By {METRICS[name][0]}: {'; '.join(sentences)}. What this run could have seen: {power}."


def pair_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table that compares each variant with those before it, by the first metric.

    With many verdicts at 95 %, some are wrong: one in twenty if there is no difference.
    """
    name = shown_metrics(results)[0]
    rows = []
    for number, (variant, seeds) in enumerate(results.items()):
        row = [variant]
        for others in list(results.values())[:number]:
            change = difference(of_seeds(seeds, name), of_seeds(others, name))
            text = verdict(change, lower_is_better=METRICS[name][1])
            row.append(text if change is None else f"{change}: {text}")
        rows.append(row + [""] * (len(results) - number))
    return ["difference: row minus column", *results], rows


def plot(results: Results, path: Path) -> None:
    """Plot every metric by variant: a dot for each seed, the mean, and its interval."""
    metrics = shown_metrics(results)
    names = list(results)
    figure = Figure(figsize=(6.5 * max(len(metrics), 1), 1.2 + 0.45 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(len(metrics), 1), squeeze=False)[0], metrics, strict=True):
        for height, variant in enumerate(reversed(names)):
            values = list(of_seeds(results[variant], name).values())
            found = interval(values)
            axes.plot(values, [height] * len(values), "o", color="tab:gray", alpha=0.6, markersize=4)
            axes.errorbar(found.mean, height, xerr=found.half, fmt="D", color="tab:blue", capsize=4)
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_xlabel(f"{METRICS[name][0]} ({'lower' if METRICS[name][1] else 'higher'} is better)")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def write(results: Results, baseline: str, folder: Path, title: str, intro: str, data: str, *, margin: float = 0.01) -> None:
    """Write report.md, report.png and report.html to the folder; `margin` is the share that counts as no difference."""
    tables = [("Runs", *main_table(results))]
    if baseline in results and len(results) > 1:
        tables.append(("Verdicts", *verdict_table(results, baseline)))
        found = findings(results, baseline, margin)
        if found:
            intro = f"{intro} {summary(found, baseline, margin)}"
            tables.append(("What the seeds could have shown", *power_table(found, baseline)))
    if len(results) > 2 and shown_metrics(results):
        tables.append((f"Every pair of variants: {METRICS[shown_metrics(results)[0]][0]}", *pair_table(results)))
    plot(results, folder / "report.png")
    markdown = [f"# {title}", "", intro, ""]
    for caption, header, rows in tables:
        markdown += [f"## {caption}", "", *_markdown(header, rows), ""]
    markdown += ["![figures by variant](report.png)", ""]
    (folder / "report.md").write_text("\n".join(markdown), encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    picture = base64.b64encode((folder / "report.png").read_bytes()).decode()
    text = page.render(title=title, intro=intro, tables=tables, picture=picture, data=data)
    (folder / "report.html").write_text(text, encoding="utf-8")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(html.escape(cell, quote=False) for cell in line) + " |" for line in lines]
