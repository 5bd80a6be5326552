"""``make bench-transfer``: the hand-off between two processes against barer ways to move bytes."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from bench.kernels import machine
from bench.transfer.arms import ARMS, peer
from bench.transfer.hidden import Timeline, measure_hidden
from bench.transfer.measure import (
    MB,
    ShapeResult,
    SizeResult,
    measure_shapes,
    measure_sizes,
)
from stateferry.bundled import bundled_model_dir

SIZES_MB = (1, 16, 64, 256)
# Source, staging on both sides and the bare arms' buffers together stay below 2 GB.
MAX_BYTES = 320 * MB
NO_MIGRATION = "null: live migration is not part of this benchmark yet"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    # Fails here rather than after minutes when it is not installed.
    from bench.transfer.plot import plot

    console = Console(width=150)
    started, load = time.perf_counter(), machine.ForeignLoad()
    title = ", ".join(f"{name} {value}" for name, value in machine.describe(1).items())
    console.print(title, highlight=False)

    def show(result: SizeResult | ShapeResult) -> None:
        elapsed_s = time.perf_counter() - started
        console.print(f"{elapsed_s:.0f} s: {result}", style="dim", highlight=False)

    async def measure() -> tuple[list[SizeResult], list[ShapeResult], Timeline]:
        async with peer(MAX_BYTES) as other:
            sizes = await measure_sizes(other, SIZES_MB, options.rounds, show)
            shapes = await measure_shapes(other, options.shape_rounds, MAX_BYTES, show)
        return sizes, shapes, await measure_hidden(options.model, options.prompt_tokens, 4)

    sizes, shapes, timeline = uvloop.run(measure())
    _print(console, sizes, shapes)
    console.print(
        f"{timeline.hidden_share():.1%} of the hand-off seconds lay within the same prompt's "
        f"computing. Others used {load.share():.1%} of the processors."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "bench-transfer.png"
    plot(sizes, shapes, timeline, title, picture)
    console.print(f"Plot: {picture}")
    print("RESULT", json.dumps(result_of(sizes, shapes, timeline)))
    return 0


def result_of(
    sizes: list[SizeResult], shapes: list[ShapeResult], timeline: Timeline
) -> dict[str, object]:
    """What the last line says."""
    at_64 = next(result for result in sizes if result.size_mb == 64)
    return {
        "gbps_64mb_vs_ucx": round(at_64.vs_ucx, 3),
        "gbps_64mb_vs_grpc": round(at_64.vs_grpc, 3),
        "hidden_share": round(timeline.hidden_share(), 3),
        "migration_32k_vs_1k": None,
        "migration_vs_reprefill": None,
        "migration_note": NO_MIGRATION,
        "gbps": {
            str(r.size_mb): {arm: round(rate, 3) for arm, rate in r.gbps.items()} for r in sizes
        },
        "cpu_s_per_handoff": {str(r.size_mb): round(r.cpu_s, 5) for r in sizes},
        "handoff_s": {
            f"{r.model}, {r.prompt_tokens}": {
                "seconds": round(r.seconds, 4),
                "cpu_s": round(r.cpu_s, 4),
                "total_mb": round(r.total_bytes / MB, 1),
                "moved_mb": round(r.moved_bytes / MB, 1),
            }
            for r in shapes
        },
    }


def _print(console: Console, sizes: list[SizeResult], shapes: list[ShapeResult]) -> None:
    table = Table(title="GB/s, medians; CPU seconds of both processes")
    for column in ("MB", *ARMS, "over ucxx", "over gRPC", "CPU s per hand-off"):
        table.add_column(column)
    for size in sizes:
        rates = [f"{size.gbps[arm]:.2f}" for arm in ARMS]
        ratios = (f"{size.vs_ucx:.2f}", f"{size.vs_grpc:.2f}", f"{size.cpu_s:.4f}")
        table.add_row(str(size.size_mb), *rates, *ratios)
    console.print(table)
    table = Table(title="Hand-offs of public models' shapes")
    for column in ("model", "prompt tokens", "MB", "seconds", "CPU seconds", "note"):
        table.add_column(column)
    for r in shapes:
        numbers = (f"{r.moved_bytes / MB:.0f}", f"{r.seconds:.3f}", f"{r.cpu_s:.3f}")
        table.add_row(r.model, str(r.prompt_tokens), *numbers, r.note)
    console.print(table)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-transfer", allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=bundled_model_dir())
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, below a minute")
    options = parser.parse_args(arguments)
    options.rounds, options.shape_rounds = (5, 1) if options.quick else (21, 5)
    options.prompt_tokens = 1024 if options.quick else 4096
    return options


if __name__ == "__main__":
    raise SystemExit(main())
