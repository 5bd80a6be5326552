"""Time to the first token with and without a snapshot, and their ratio, against the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from bench.cache.resume_time import ResumeRow


def plot(rows: Sequence[ResumeRow], caption: str, path: Path) -> None:
    """Writes a PNG."""
    lengths = [row.prefix_tokens for row in rows]
    figure, (times, ratios) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    times.plot(lengths, [row.prefill_s * 1e3 for row in rows], "--o", label="prefix computed")
    times.plot(lengths, [row.resume_s * 1e3 for row in rows], "-o", label="prefix resumed")
    times.set(title="Time to the first token", ylabel="ms (median)", yscale="log")
    times.legend()
    ratios.plot(lengths, [row.ratio for row in rows], "-o", color="tab:green")
    ratios.set(title="Computed / resumed", ylabel="ratio", ylim=(0, None))
    for axes in (times, ratios):
        axes.set(xlabel="prefix, tokens", xscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, which="major", alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
