"""Tables for people, and RESULT for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cache.policies import OURS, Share
from bench.cache.resume_time import ResumeRow
from bench.cache.suite import Outcome
from bench.kernels.report import result_line

__all__ = ["print_outcome", "print_rates", "print_resume", "result_line", "workload_result"]


def print_outcome(console: Console, outcome: Outcome) -> None:
    table = _table("policy", "memory cut", "hit rate", "TTFT p50 ms", "ours is faster by")
    table.title = f"{outcome.workload.name}: {outcome.workload.num_requests} requests"
    best = max(outcome.hit_rate.values()), min(outcome.ttft_p50_s.values())
    for name, rate in outcome.hit_rate.items():
        ttft_s = outcome.ttft_p50_s[name]
        behind = name == OURS and (rate, ttft_s) != best
        table.add_row(
            name,
            _cut(outcome.shares[name]),
            f"{rate:.3f}",
            f"{ttft_s * 1e3:.1f}",
            "" if name == OURS else f"{outcome.ttft_ratio(name):.2f}x",
            style="red" if behind else "green" if name == OURS else None,
        )
    console.print(table)


def print_rates(console: Console, title: str, rates: Mapping[str, Mapping[str, float]]) -> None:
    """Hit rates by workload and then by policy."""
    names = list(next(iter(rates.values())))
    table = _table("workload", *names)
    table.title = title
    for workload, by_name in rates.items():
        table.add_row(workload, *(f"{by_name[name]:.3f}" for name in names))
    console.print(table)


def print_resume(console: Console, rows: Sequence[ResumeRow]) -> None:
    table = _table("prefix tokens", "computed ms", "resumed ms", "ratio")
    table.title = "Time to the first token"
    for row in rows:
        table.add_row(
            f"{row.prefix_tokens}",
            f"{row.prefill_s * 1e3:.2f}",
            f"{row.resume_s * 1e3:.2f}",
            f"{row.ratio:.1f}",
        )
    console.print(table)


def workload_result(outcome: Outcome) -> dict[str, Any]:
    return {
        "hit_rate": outcome.hit_rate,
        "ttft_p50_s": outcome.ttft_p50_s,
        "ttft_over_ours": {name: outcome.ttft_ratio(name) for name in outcome.played},
        "rounds": {
            name: [[one.hit_rate, one.ttft_p50_s, one.wall_s] for one in rounds]
            for name, rounds in outcome.played.items()
        },
        "memory_cut": {
            name: None if share is None else vars(share) for name, share in outcome.shares.items()
        },
        "requests": outcome.workload.num_requests,
    }


def _cut(share: Share | None) -> str:
    if share is None:
        return "default"
    return f"{share.states} state, {share.tails} tail, {share.tokens} tokens"


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table
