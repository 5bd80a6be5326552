"""The table for people, and RESULT for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peers.contenders import OURS, PEERS
from bench.peers.suite import Row, geometric_mean

# What the project promises.
MIN_RATIO, GEOMEAN_RATIO, CLUSTER_VS_ENGINE = 1.0, 1.3, 0.85


def print_rows(console: Console, rows: Sequence[Row], absent: Mapping[str, str]) -> None:
    """Tokens/s, the best peer marked."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "dtype", "case"):
        table.add_column(column, no_wrap=True)
    columns = (OURS, *PEERS, "best peer", "ratio", "ceiling", "reached")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        rates = [_rate(row, name) for name in (OURS, *PEERS)]
        ratio = "no peer" if row.ratio is None else f"{row.ratio:.2f}"
        behind = row.ratio is not None and row.ratio < MIN_RATIO
        reached = f"{row.ours / row.ceiling:.0%}"
        table.add_row(
            *(row.model, row.dtype, row.case, *rates, row.best or "none", ratio),
            *(f"{row.ceiling:,.0f}", reached),
            style="red" if behind else None,
        )
    console.print(table)
    for name, why in absent.items():
        console.print(f"{name} did not take part: {why}", style="yellow", soft_wrap=True)


def print_serving(console: Console, served: Mapping[str, Any]) -> None:
    console.print(
        f"{served['model']} {served['dtype']}, {served['case']}: engine {served['engine']:,.1f},"
        f" cluster {served['cluster']:,.1f} tokens/s, ratio {served['ratio']:.2f}"
        f" ({served['threads_per_worker']} threads per worker)",
        highlight=False,
    )


def row_result(row: Row, absent: Mapping[str, str]) -> dict[str, Any]:
    return {
        "model": row.model,
        "dtype": row.dtype,
        "case": row.case,
        "ours": row.ours,
        "best_peer": row.rates[row.best] if row.best else None,
        "best_peer_name": row.best,
        "ratio": row.ratio,
        "peers": {name: row.rates.get(name, absent.get(name, "failed")) for name in PEERS},
        "glimpsed": sorted(row.glimpsed),
        "ceiling": row.ceiling,
        "ceiling_reached": row.ours / row.ceiling,
    }


def ratios_of(rows: Sequence[Row]) -> dict[str, float | None]:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return {
        "min_ratio": min(ratios, default=None),
        "geomean_ratio": geometric_mean(ratios),
    }


def print_targets(console: Console, result: Mapping[str, Any]) -> None:
    wanted = {
        "min_ratio": MIN_RATIO,
        "geomean_ratio": GEOMEAN_RATIO,
        "cluster_vs_engine": CLUSTER_VS_ENGINE,
    }
    for name, least in wanted.items():
        value = result[name]
        if value is not None:
            verdict = "ok" if value >= least else "MISSED"
            console.print(f"{name} {value:.2f}, wanted >= {least}: {verdict}", highlight=False)


def result_line(result: Mapping[str, Any]) -> str:
    return "RESULT " + json.dumps(_rounded(result))


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _rate(row: Row, name: str) -> str:
    """``~`` before a rate from a short look only."""
    value = row.rates.get(name)
    if value is None:
        return "-"
    return f"{'~' if name in row.glimpsed else ''}{value:,.1f}"
