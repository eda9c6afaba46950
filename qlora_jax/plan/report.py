"""Output of plans: a table in GiB, plain values for JSON, and a stacked bar of memory beside the device's limit."""

import dataclasses
from pathlib import Path
from typing import Any

from qlora_jax.errors import OptionError
from qlora_jax.plan.devices import Machine

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """The memory of one program, in bytes on each device.

    Attributes:
        title: the name of the plan.
        machine: the machine that was planned for.
        device, host: the parts of device and of host memory as (name, bytes), in the order of a bar.
        total: the bytes of device memory, which the parts add up to.
        notes: parts of the parts, as (name of the whole, name, bytes).
        flops, traffic: the operations and the bytes of device memory of one run; None if they were not counted.
        cycles: the cycles that the compiler of a TPU expects; None if it expects none.
        unknown_kernels: how often kernels run that are not in `cycles`.
        seconds: the time of compiling or of estimating.
        method: how the numbers were obtained.
        values: further values for JSON.
    """

    title: str
    machine: Machine
    device: tuple[tuple[str, int], ...]
    host: tuple[tuple[str, int], ...]
    total: int
    flops: float | None
    traffic: int | None
    seconds: float
    method: str
    notes: tuple[tuple[str, str, int], ...] = ()
    cycles: int | None = None
    unknown_kernels: int = 0
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the total is within the device's memory."""
        return self.total <= self.machine.device.memory_bytes

    @property
    def floors(self) -> dict[str, float]:
        """The least seconds that one run takes, by compute and by memory."""
        kind = self.machine.device
        found = {} if self.flops is None else {"compute": self.flops / kind.flops}
        return found if self.traffic is None else {**found, "memory": self.traffic / kind.bandwidth}

    @property
    def expected_seconds(self) -> float | None:
        """The seconds that the compiler of a TPU expects, without the kernels that it does not know."""
        clock = self.machine.device.clock
        return None if self.cycles is None or clock is None else self.cycles / clock


def table(report: Report) -> str:
    """Return the report as a table in GiB, with one line for each part."""
    memory = report.machine.device.memory_bytes
    each = " each" if report.machine.count > 1 else ""
    lines = [f"{report.title} on {report.machine.description} ({memory / GIB:.2f} GiB{each}), GiB{each}:"]
    for name, size in report.device:
        lines.append(f"  {name:36s}{size / GIB:10.3f}")
        lines += [f"    of it {what:30s}{part / GIB:10.3f}" for of, what, part in report.notes if of == name]
    verdict = "fits" if report.fits else "does not fit"
    lines.append(f"  {'total':36s}{report.total / GIB:10.3f}   {verdict}: {report.total / memory:.1%} of the device")
    lines += [f"  {f'host: {name}':36s}{size / GIB:10.3f}" for name, size in report.host if size]
    if report.flops is not None:
        lines.append(f"  {report.flops / 1e12:.2f} TFLOP of products at {report.machine.device.flops / 1e12:.0f} TFLOP/s")
    if report.traffic is not None:
        bandwidth = report.machine.device.bandwidth / 1e9
        lines.append(f"  {report.traffic / 1e9:.2f} GB of memory traffic at {bandwidth:.0f} GB/s")
    if report.floors:
        name, floor = max(report.floors.items(), key=lambda item: item[1])
        lines.append(f"  takes at least {floor * 1e3:.2f} ms, by {name}")
    if (expected := report.expected_seconds) is not None:
        other = f", without {report.unknown_kernels} runs of kernels" if report.unknown_kernels else ""
        lines.append(f"  the compiler expects {expected * 1e3:.2f} ms{other}")
    return "\n".join([*lines, f"  {report.method}, {report.seconds:.1f} s"])


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values for JSON."""
    device = report.machine.device
    return {
        "method": report.method,
        "title": report.title,
        "device": report.machine.description,
        "device_name": report.machine.name,
        "devices": report.machine.count,
        "memory_bytes": device.memory_bytes,
        "device_bytes": dict(report.device),
        "host_bytes": dict(report.host),
        "of_which": {f"{of}: {what}": size for of, what, size in report.notes},
        "peak": report.total,
        "host_peak": sum(size for _, size in report.host),
        "fits": report.fits,
        "flops": report.flops,
        "traffic_bytes": report.traffic,
        "floor_seconds": report.floors,
        "cycles": report.cycles,
        "unknown_kernels": report.unknown_kernels,
        "expected_seconds": report.expected_seconds,
        "seconds": report.seconds,
        **report.values,
    }


def check_drawing(path: Path) -> None:
    """Raise OptionError if `draw` could not write such a file; to be called before minutes of compiling."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise OptionError(f"plot: expected a file that ends in one of {', '.join(sorted(known))}, found {path}")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"plot: expected a folder that exists, found {path.absolute().parent}")


def draw(reports: list[Report], path: Path) -> None:
    """Draw one bar for each report, stacked from its parts, beside the memory of the device."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 2.5 * len(reports), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for report in reports for name, _ in report.device))
    bottoms = [0.0] * len(reports)
    for index, name in enumerate(names):
        heights = [dict(report.device).get(name, 0) / GIB for report in reports]
        axes.bar(range(len(reports)), heights, 0.6, bottom=bottoms, label=name, color=f"C{index}")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, report in enumerate(reports):
        limit = report.machine.device.memory_bytes / GIB
        axes.hlines(limit, place - 0.4, place + 0.4, colors="black", linestyles="dashed")
        axes.annotate(f"{report.total / GIB:.2f} GiB", (place, bottoms[place]), ha="center", va="bottom")
    axes.hlines([], 0, 0, colors="black", linestyles="dashed", label="memory of the device")
    axes.set_xticks(range(len(reports)), [f"{report.title}\n{report.machine.description}" for report in reports])
    axes.set_ylabel("GiB on each device")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    axes.margins(x=0.2)
    figure.savefig(path, dpi=150)
