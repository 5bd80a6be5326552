"""Time against length for the scan, against batch for the step and the decode row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from bench.kernels.bench_row import STEP
from bench.kernels.ceilings import STREAM
from bench.kernels.rows import OURS, Row

_PANELS = (
    ("chunk_scan", "Chunk scan, one sequence", "tokens"),
    ("state_step", "Plain state update, one layer", "sequences"),
    ("decode_row", "Decode token in grid form, one layer", "sequences"),
)


def plot(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Writes a PNG of the fp32 rows."""
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(17, 5.4), layout="constrained")
    for axes, (operation, title, unit) in zip(panels, _PANELS, strict=True):
        axes.set(title=title, xlabel=unit, ylabel="time, us (median)", xscale="log", yscale="log")
        _panel(axes, [r for r in rows if r.operation == operation and r.dtype == "fp32"])
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(caption, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        # The matmul ceiling does the same work at every length.
        if row.seconds is not None and "torch matmul" not in row.contender:
            size = int("".join(filter(str.isdigit, row.case)))
            lines.setdefault(row.contender, []).append((size, row.seconds * 1e6))
    for name, points in lines.items():
        sizes, times = zip(*sorted(points), strict=True)
        ours = name.startswith(OURS)
        style = "-" if ours else ":" if name == STREAM else "--"
        label = f"{name} (reads and writes every state)" if name == STEP else name
        axes.plot(sizes, times, style, marker="o", linewidth=2.2 if ours else 1.2, label=label)
    ticks = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
