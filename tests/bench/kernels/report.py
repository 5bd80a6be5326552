"""The table for people, and RESULT for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.kernels.rows import OURS, Row

# RESULT key -> the least it must show, and for which entries of an object.
TARGETS = {
    "state_update_vs_stream": (0.8, ("8", "64")),
    "state_update_vs_torch": (3.0, ("1", "8", "64")),
    "decode_row_vs_step": (1.0, ("1", "8", "64")),
    "chunk_scan_vs_matmul": (0.6, ()),
    "chunk_scan_vs_torch": (1.5, ()),
    "skinny_linear_vs_torch": (1.0, ("fp32_m1", "fp32_m8", "bf16_m1", "bf16_m8")),
    "state_update_vs_vllm": (1.0, ("1", "8", "64")),
    "chunk_scan_vs_vllm": (1.0, ()),
}


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("operation", "case", "dtype", "who"):
        table.add_column(column, no_wrap=True)
    for column in ("median us", "best us", "rate", "ours is faster by"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        here = (row.operation, row.case, row.dtype)
        shown = here if here != previous else ("", "", "")
        previous = here
        style = "green" if row.contender.startswith(OURS) else None
        table.add_row(*shown, row.contender, *_cells(row), style=style)
    console.print(table)


def _cells(row: Row) -> tuple[str, ...]:
    if row.seconds is None or row.best_seconds is None or row.rate is None:
        return ("not installed", "", "", "")
    return (
        f"{row.seconds * 1e6:,.1f}",
        f"{row.best_seconds * 1e6:,.1f}",
        f"{row.rate:,.1f} {row.unit}",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
    )


def print_targets(console: Console, result: dict[str, Any]) -> None:
    """What the project promises against what came out."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("ratio", "measured", "wanted", ""):
        table.add_column(column, no_wrap=True)
    for key, (wanted, entries) in TARGETS.items():
        value = result.get(key)
        values = value if isinstance(value, dict) else {"": value}
        for entry, number in values.items():
            if number is None:
                continue
            held = not entries or entry in entries
            verdict = "" if not held else "ok" if number >= wanted else "MISSED"
            needed = f">= {wanted}" if held else ""
            table.add_row(f"{key} {entry}", f"{number:.2f}", needed, verdict)
    console.print(table)


def result_line(result: dict[str, Any]) -> str:
    return "RESULT " + json.dumps(_rounded(result))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
