"""``make gpu-report``: the kernels' tests on this GPU, then benchmarks against peers and the card's
own limits, a table, and one line RESULT."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import triton

from bench.gpu import kernel_tests, warm
from bench.gpu.bench_attention import CASES, HEADS, bench_attention
from bench.gpu.bench_rows import BATCHES, bench_decode, bench_verify
from bench.gpu.bench_scan import LENGTHS, bench_scan, bench_snapshots
from bench.gpu.ceilings import ceilings
from bench.gpu.peers import load
from bench.gpu.plot import plot
from bench.gpu.report import result_line, result_of, table, verdicts
from bench.gpu.rows import Row
from bench.gpu.workload import SHAPES


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if not torch.cuda.is_available():
        print("make gpu-report: there is no CUDA device here", file=sys.stderr)
        return 2
    started = time.perf_counter()

    def note(what: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {what}", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    warming = warm.start(options.peers)
    tests: dict[str, int] = {}
    if not options.no_tests:
        workers = max(1, 3 * (os.cpu_count() or 2) // 4)
        tests = kernel_tests.run(options.out / "tests.log", workers)
        note(f"tests: {tests}, in {options.out / 'tests.log'}")
    for process in warming:
        process.wait()
    peers = load(options.peers)
    note(f"peers: {', '.join(peers.modules) or 'none'}")
    for name, why in peers.missing.items():
        note(f"no {name}: {why}")
    limits = ceilings()
    note(", ".join(f"{name} {value:.2f}" for name, value in limits.items()))
    rows: list[Row] = []
    for shape in SHAPES[: 1 if options.quick else None]:
        shown = len(rows)
        for case in LENGTHS:
            rows += bench_scan(shape, case, peers)
        for grid in (64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                rows += bench_snapshots(shape, grid, dtype)
        for batch in BATCHES:
            for dtype in (torch.float32, torch.bfloat16):
                rows += bench_decode(shape, batch, dtype, peers, limits["update_tbs"])
        rows += bench_verify(shape, 64, peers)
        note(shape.name)
        # Already here, in case that the run is cut off.
        print(table(rows[shown:]), flush=True)
    for name in tuple(HEADS)[: 1 if options.quick else None]:
        for case in CASES:
            rows += bench_attention(name, case, limits["update_tbs"])
    note("attention")
    gpu = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    result = result_of(rows, limits) | {
        "tests": tests,
        "ceilings": limits,
        "gpu": gpu,
        "versions": versions,
        "wall_s": time.perf_counter() - started,
    }
    engine_table = ""
    if not options.quick and find_spec("llguidance") is not None:
        # Kernels alone can be measured without what an engine needs.
        from bench.gpu import bench_engine

        engine_rows = bench_engine.bench(limits["update_tbs"])
        engine_table = bench_engine.table(engine_rows)
        result["engine"] = [asdict(row) for row in engine_rows]
        note("engine")
    plot(rows, f"{gpu}, {versions}, bf16 activations", options.out / "performance.png")
    print(table(rows))
    print(engine_table)
    print(verdicts(result))
    print(result_line(result))
    bad = tests.get("failed", 0) + tests.get("error", 0) + tests.get("errors", 0)
    return 1 if bad or (not options.no_tests and not tests.get("passed")) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu-report ARGS=..", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of log and plot")
    parser.add_argument("--peers", type=Path, help="folder of other projects' kernels: peers.py")
    parser.add_argument("--quick", action="store_true", help="one model's shape")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
