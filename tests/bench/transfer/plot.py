"""The picture of ``make bench-transfer``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.transfer.arms import ARMS
from bench.transfer.hidden import Timeline
from bench.transfer.measure import ShapeResult, SizeResult


def plot(
    sizes: Sequence[SizeResult],
    shapes: Sequence[ShapeResult],
    timeline: Timeline,
    title: str,
    target: Path,
) -> None:
    """Left GB/s by size, middle seconds by model and prompt, right when what went on."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    for arm in ARMS:
        left.plot([r.size_mb for r in sizes], [r.gbps[arm] for r in sizes], marker="o", label=arm)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("MB")
    left.set_ylabel("GB/s")
    left.legend(fontsize=8)
    for model in dict.fromkeys(r.model for r in shapes):
        of_model = [r for r in shapes if r.model == model]
        tokens = [r.prompt_tokens for r in of_model]
        middle.plot(tokens, [r.seconds for r in of_model], marker="o", label=model)
    middle.set_xscale("log", base=2)
    middle.set_xlabel("prompt tokens (KV cut where noted)")
    middle.set_ylabel("hand-off seconds")
    middle.legend(fontsize=8)
    begin = min(start for start, _ in timeline.computing)
    for row, spans in enumerate((timeline.computing, timeline.handing_off)):
        right.broken_barh([(a - begin, b - a) for a, b in spans], (row - 0.4, 0.8), color=f"C{row}")
    right.set_yticks([0, 1], ["computing", "handing off"])
    right.set_xlabel(f"s; hidden share {timeline.hidden_share():.2f}")
    figure.suptitle(title, fontsize=8)
    figure.savefig(target, dpi=120)
