"""``make bench-cache``: the prefix cache against what others keep, in the same memory."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by OpenMP when torch loads it: idle threads must sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console

from bench.cache import report
from bench.cache.chat import ChatShape, chat
from bench.cache.contenders import Bench, Setup
from bench.cache.overlap import overlap_speedup
from bench.cache.patterns import PATTERNS, conversations
from bench.cache.resume_time import resume_rows
from bench.cache.suite import Outcome, dry_rates, eviction_rates, run_policies
from bench.cache.trace import Record, divisor, families, read_records, scaled
from bench.cache.workload import Workload
from bench.exact_cost import exact_cost
from bench.kernels import machine
from bench.kernels.measure import Mismatch
from stateferry.bundled import bundled_model_dir
from stateferry.config import ModelSection

# Prompts are divided until prompt and output fit into it.
TRACE_CONTEXT_TOKENS = 8192
RESUME_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
THREADS = 2


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    # Fails here rather than after minutes when it is not installed.
    from bench.cache.plot import plot

    console = Console(width=150)
    started, load = time.perf_counter(), machine.ForeignLoad()
    facts = machine.describe(THREADS)
    title = ", ".join(f"{name} {value}" for name, value in facts.items())
    console.print(title, highlight=False)

    def show(text: str) -> None:
        console.print(f"{text}; {time.perf_counter() - started:.0f} s", style="dim")

    records = read_records(options.trace) if options.trace else conversations(options.seed, 300)
    longest = 512 if options.quick else RESUME_LENGTHS[-1]
    # With memory for all.
    roomy = Bench(Setup(options.model, 1 << 30, longest + 128, max_requests=1, threads=THREADS))
    vocab_size = roomy.vocab_size
    outcomes: list[Outcome] = []
    benches = {}
    try:
        for workload in _workloads(options, records, vocab_size):
            bench = benches[workload.name] = _bench(options, workload)
            outcomes.append(run_policies(bench, workload, options.rounds, show))
            report.print_outcome(console, outcomes[-1])
    except Mismatch as error:
        console.print(f"wrong tokens, nothing is reported: {error}", style="bold red")
        return 1
    dry, eviction = _without_a_model(options, records, vocab_size)
    report.print_rates(console, "Hit rates without a model", dry)
    report.print_rates(console, "Ours, by what is evicted first", eviction)
    lengths = [length for length in RESUME_LENGTHS if length <= longest]
    rows = resume_rows(roomy, lengths, options.rounds, options.seed)
    report.print_resume(console, rows)
    picture = options.out / "bench-cache.png"
    plot(rows, title, picture)
    speedup = overlap_speedup(benches["chat"], options.rounds, options.seed)
    cost = exact_cost(options.model, rounds=options.rounds, threads=THREADS)
    console.print(
        f"Throughput with overlap over that without: {speedup:.3f}. What exact numerics cost: "
        f"{cost['exact_cost']:.3f}.",
        highlight=False,
    )
    flat = report.workload_result(outcomes[-1] if options.trace else outcomes[0])
    result: dict[str, Any] = {
        "hit_rate": flat["hit_rate"],
        "ttft_p50_s": flat["ttft_p50_s"],
        "overlap_speedup": speedup,
        "exact_cost": cost["exact_cost"],
        "workloads": {one.workload.name: report.workload_result(one) for one in outcomes},
        "hit_rate_dry": dry,
        "eviction": eviction,
        "exact_cost_cases": cost["cases"],
        "resume": [vars(row) for row in rows],
        "memory_bytes": options.memory_bytes,
        "seed": options.seed,
        "quick": options.quick,
        "machine": facts,
        "foreign_cpu_share": load.share(),
        "wall_s": time.perf_counter() - started,
    }
    console.print(
        f"Others used {result['foreign_cpu_share']:.0%} of the processors meanwhile."
        f" Plot: {picture}",
        highlight=False,
    )
    print(report.result_line(result))
    return 0


def _workloads(
    options: argparse.Namespace, records: list[Record], vocab_size: int
) -> Iterator[Workload]:
    shape = ChatShape(conversations=8, open_at_once=6) if options.quick else ChatShape()
    yield chat(options.seed, vocab_size, shape)
    name = "trace" if options.trace else "made_trace"
    yield scaled(
        name,
        families(records, 24 if options.quick else options.requests),
        divide=divisor(records, TRACE_CONTEXT_TOKENS),
        seed=options.seed,
        vocab_size=vocab_size,
    )


def _without_a_model(
    options: argparse.Namespace, records: list[Record], vocab_size: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Of longer workloads, and of more kinds than there is time to compute."""
    seed, requests = options.seed, 100 if options.quick else 500
    known = {"recorded": families(records, requests)} if options.trace else {}
    made = {name: pattern(seed + 1, requests) for name, pattern in PATTERNS.items()}
    workloads = [
        scaled(
            name,
            entries,
            divide=divisor(entries, TRACE_CONTEXT_TOKENS),
            seed=seed,
            vocab_size=vocab_size,
        )
        for name, entries in (known | made).items()
    ]
    shape = ChatShape(conversations=requests // 5, open_at_once=40)
    workloads.append(chat(seed + 1, vocab_size, shape, name="chat"))
    dry, eviction = {}, {}
    for workload in workloads:
        bench = _bench(options, workload)
        dry[workload.name] = dry_rates(bench, workload)
        eviction[workload.name] = eviction_rates(bench, workload)
    return dry, eviction


def _bench(options: argparse.Namespace, workload: Workload) -> Bench:
    grid = ModelSection().grid_tokens
    context_tokens = -(-workload.most_tokens // grid) * grid
    return Bench(Setup(options.model, options.memory_bytes, context_tokens, threads=THREADS))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-cache ARGS=..", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is made")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="traffic in Mooncake's format")
    parser.add_argument("--requests", type=int, default=300, help="of the trace, about")
    parser.add_argument("--model", type=Path, default=bundled_model_dir(), help="directory")
    parser.add_argument(
        "--memory-bytes", type=int, default=192 << 20, help="of each policy, for all it holds"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="less of everything, for a look")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the plot")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = min(options.rounds, 2)
    return options


if __name__ == "__main__":
    sys.exit(main())
