"""Scan times by model, and a decode token against batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.gpu.bench_rows import GRID_FORM
from bench.gpu.rows import OURS, Row

_ORDER = (OURS, "mamba_ssm", "vllm", "sglang")


def plot(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    scans = [r for r in rows if r.operation == "chunk scan" and r.case == "1 x 8k"]
    shapes = list(dict.fromkeys(row.shape for row in scans))
    names = [name for name in _ORDER if any(row.contender == name for row in scans)]
    for i, name in enumerate(names):
        us = {row.shape: row.us for row in scans if row.contender == name}
        places = [place + 0.8 * i / len(names) for place in range(len(us))]
        left.bar(places, us.values(), 0.8 / len(names), label=name)
    left.set(title="Chunk scan, one sequence of 8,192 tokens", ylabel="us, one layer")
    left.set_xticks([place + 0.3 for place in range(len(shapes))], shapes, fontsize=7)
    left.legend(fontsize=8)
    decodes = [r for r in rows if r.operation == "decode" and "fp32" in r.case]
    first = decodes[0].shape if decodes else ""
    for name in (GRID_FORM, *_ORDER):
        points = [
            (int(row.case.split()[1].strip(",")), row.us)
            for row in decodes
            if row.shape == first and row.contender == name
        ]
        if points:
            label = f"{name}, plain step" if name == OURS else name
            right.plot(*zip(*points, strict=True), marker="o", label=label)
    right.set(
        title=f"Decode token, {first}, fp32 states",
        xlabel="sequences",
        ylabel="us, one layer",
        xscale="log",
        yscale="log",
    )
    right.legend(fontsize=8)
    figure.suptitle(caption, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
