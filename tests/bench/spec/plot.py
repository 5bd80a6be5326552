"""The picture of ``make bench-spec``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.spec.duel import Duel
from bench.spec.kernel_times import KernelRatio


def plot(duels: Sequence[Duel], ratios: Sequence[KernelRatio], title: str, target: Path) -> None:
    """Left the speed-ups, right a layer's times by draft."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names = [f"{duel.task}\nbatch {duel.batch}" for duel in duels]
    left.bar(names, [duel.ratio for duel in duels])
    left.axhline(1.0, color="black", linewidth=0.8)
    left.set_ylabel("tokens/s with drafts over without")
    left.tick_params(axis="x", labelrotation=30, labelsize=7)
    for nheads in sorted({ratio.nheads for ratio in ratios}):
        of_heads = [ratio for ratio in ratios if ratio.nheads == nheads]
        drafts = [ratio.draft for ratio in of_heads]
        right.plot(drafts, [r.ours for r in of_heads], marker="o", label=f"{nheads} heads")
        style = {"linestyle": "--", "marker": "x"}
        label = f"{nheads} heads, a state per token"
        right.plot(drafts, [r.per_step for r in of_heads], label=label, **style)
    right.set_ylabel("times of one decode row")
    right.set_yscale("log")
    right.tick_params(axis="x", labelrotation=30, labelsize=8)
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(target, dpi=120)
