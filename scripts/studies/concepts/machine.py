"""Pictures of memory and batches: what lives where, packed rows, and the rows of many tenants."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.commands.plan import PlanCommandOptions, read_spec
from qlora_jax.data import pack
from qlora_jax.plan import Machine, QuickPlan, machine_named, quick_plan
from scripts.studies.concepts.style import COLORS, figure, save

__all__ = ["draw_memory", "draw_packing", "draw_tenants"]

_PARTS = (
    ("packed weights", "packed_weights"),
    ("other frozen weights", "dense_weights"),
    ("adapter", "adapter"),
    ("optimizer", "optimizer"),
    ("residuals", "residuals"),
    ("gradients", "gradients"),
    ("working memory", "working"),
)


def draw_memory(path: Path) -> None:
    """Draw what is in device memory and in host memory during a step of Llama-3-8B, for three choices."""
    machine = machine_named("h100")
    fig, axis = figure(1, 1, height=2.9)
    choices = (
        ("all on the device", {}, None),
        ("--host-offload", {"host_offload": True}, None),
        ("and --host-adapter\n--remat offload", {"host_offload": True, "host_adapter": True}, "offload"),
    )
    for row, (_, optimizer, remat) in enumerate(choices):
        found = _plan(optimizer, remat, machine)
        left = 0.0
        for (name, field), color in zip(_PARTS, COLORS, strict=False):
            size = getattr(found, field) / 2**30
            axis.barh(row, size, left=left, color=color, label=name if row == 0 else None)
            left += size
        on_host = (found.host_optimizer + found.host_adapter + found.host_residuals) / 2**30
        axis.barh(
            row, -on_host, color="lightgrey", hatch="//", edgecolor="grey", label="in host memory" if row == 0 else None
        )
        axis.text(left + 0.1, row, f"{left:.2f} GiB", va="center")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(yticks=range(len(choices)), yticklabels=[label for label, *_ in choices])
    axis.set(xlabel="GiB: host memory to the left of 0, device memory to the right")
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=8, frameon=False)
    save(fig, path)


def _plan(optimizer: dict[str, bool], remat: str | None, machine: Machine) -> QuickPlan:
    """Return the quick plan of a step of Llama-3-8B with a LoRA of rank 16 and 4 rows of 2048 tokens."""
    options = PlanCommandOptions()
    options = dataclasses.replace(
        options,
        lora=dataclasses.replace(options.lora, rank=16),
        data=dataclasses.replace(options.data, max_length=2048, packing=False),
        run=dataclasses.replace(options.run, batch_size=4),
        optimizer=dataclasses.replace(options.optimizer, **optimizer),
        model=dataclasses.replace(options.model, **({} if remat is None else {"remat": remat})),
    )
    spec = read_spec(options, "llama-3-8b", machine)
    return quick_plan(spec, machine.device.target)


def draw_packing(lengths: Sequence[int], length: int, path: Path) -> None:
    """Draw the first rows of a data set as padded rows of one example each, and as packed rows."""
    shown = 12
    padded = [[index] for index in range(len(lengths))]
    packed = pack(lengths, length)
    fig, axes = figure(1, 2, height=2.6, sharex=True)
    for axis, name, rows in zip(axes, ("one example a row", "packed"), (padded, packed), strict=True):
        empty = 1 - sum(lengths) / (len(rows) * length)
        for row, items in enumerate(rows[:shown]):
            axis.barh(row, length, color="#eeeeee")
            left = 0
            for index in items:
                axis.barh(
                    row, lengths[index], left=left, color=COLORS[index % len(COLORS)], edgecolor="white", linewidth=0.5
                )
                left += lengths[index]
        axis.invert_yaxis()
        axis.set(yticks=(), xlabel="tokens", title=f"{name}: {len(rows)} rows, {empty:.0%} padding")
    save(fig, path)


def draw_tenants(path: Path) -> None:
    """Draw a batch of four tenants' rows, the one base, and the slots of the bank that the rows choose."""
    fig, axis = figure(1, 1, height=2.8)
    rows = (("alice", 1), ("bob", 2), ("alice", 1), ("the bare base", 0), ("carol", 4))
    for row, (name, slot) in enumerate(rows):
        y = 4 - row
        axis.barh(y, 1.6, left=0, color=COLORS[slot], height=0.7)
        axis.text(0.8, y, name, ha="center", va="center", color="white", fontsize=8)
        axis.annotate("", (2.6, y), (1.65, y), arrowprops={"arrowstyle": "->", "color": "grey"})
        axis.annotate(
            "",
            (6.0, 4 - slot),
            (4.45, y),
            arrowprops={"arrowstyle": "->", "color": COLORS[slot], "connectionstyle": "arc3,rad=0"},
        )
    axis.barh(2, 1.8, left=2.65, height=4.7, color=COLORS[5])
    axis.text(3.55, 2, "4-bit base,\nonce in memory\n\nx W", ha="center", va="center", color="white")
    for slot, name in enumerate(("0: no adapter", "1: alice", "2: bob", "3: free", "4: carol")):
        axis.barh(4 - slot, 1.9, left=6.05, color=COLORS[slot] if slot != 3 else "lightgrey", height=0.7)
        axis.text(7.0, 4 - slot, name, ha="center", va="center", color="white" if slot != 3 else "black", fontsize=8)
    for x, text in ((0.8, "rows of a batch"), (7.0, "slots of the bank: + (x A) B")):
        axis.text(x, 4.6, text, ha="center", fontsize=8)
    axis.set(xlim=(-0.1, 8.2), ylim=(-0.6, 5.0))
    axis.axis("off")
    save(fig, path)
