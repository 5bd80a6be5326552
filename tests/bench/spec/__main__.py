"""``make bench-spec``: decoding with drafts against decoding without."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

# Read by OpenMP when torch loads it: idle threads must sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console
from rich.table import Table

from bench.kernels import machine
from bench.spec.duel import Contender, Duel, run_duels
from bench.spec.kernel_times import KernelRatio, kernel_ratios
from bench.spec.states_moved import states_moved
from bench.spec.tasks import REPETITIVE, tasks
from stateferry.bundled import bundled_model_dir
from stateferry.config import NO_SPECULATION, SpeculationSection

BATCHES = (1, 8)
THREADS = 2


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    # Fails here rather than after minutes when it is not installed.
    from bench.spec.plot import plot

    console = Console(width=150)
    started, load = time.perf_counter(), machine.ForeignLoad()
    facts = machine.describe(THREADS)
    title = ", ".join(f"{name} {value}" for name, value in facts.items())
    console.print(title, highlight=False)
    drafter = SpeculationSection(
        drafter=options.drafter, draft_tokens=options.draft_tokens, draft_paths=options.draft_paths
    )
    on, off = (
        Contender.of(options.model, max(BATCHES), THREADS, section)
        for section in (drafter, NO_SPECULATION)
    )
    todo = tasks(options.model, options.text, max(BATCHES), options.seed)

    def show(duel: Duel) -> None:
        console.print(
            f"{duel.task}, batch {duel.batch}: {duel.ratio:.2f}; "
            f"{time.perf_counter() - started:.0f} s",
            style="dim",
        )

    duels = run_duels(
        on,
        off,
        todo,
        BATCHES,
        output_tokens=options.output_tokens,
        rounds=options.rounds,
        seed=options.seed,
        show=show,
    )
    repetitive = next(task for task in todo if task.name == REPETITIVE)
    moved, rows = states_moved(on, repetitive.requests(1, options.output_tokens, options.seed))
    ratios = kernel_ratios(quick=options.quick, threads=THREADS, seed=options.seed)
    _print(console, duels, ratios)
    console.print(
        f"A verification of {rows:.1f} rows moved {moved:.2f} states; with a state for each token "
        f"it would be {rows + 2:.1f}. Others used {load.share():.1%} of the processors."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "bench-spec.png"
    plot(duels, ratios, title, picture)
    console.print(f"Plot: {picture}")
    print("RESULT", json.dumps(result_of(duels, moved, ratios)))
    return 0


def result_of(duels: list[Duel], moved: float, ratios: list[KernelRatio]) -> dict[str, object]:
    """What the last line says."""
    of_repetitive = {duel.batch: duel for duel in duels if duel.task == REPETITIVE}
    return {
        "states_moved_per_verify": round(moved, 3),
        "speedup_b1_repetitive": round(of_repetitive[1].ratio, 3),
        "speedup_b8_repetitive": round(of_repetitive[8].ratio, 3),
        "worst_ratio": round(min(duel.ratio for duel in duels), 3),
        "acceptance": {
            f"{duel.task}, batch {duel.batch}": round(duel.acceptance, 3) for duel in duels
        },
        "exact_mismatches": sum(duel.mismatches for duel in duels),
        "tokens_per_s": {
            f"{duel.task}, batch {duel.batch}": [round(duel.on, 1), round(duel.off, 1)]
            for duel in duels
        },
        "kernel_time_ratio": [asdict(ratio) for ratio in ratios],
    }


def _print(console: Console, duels: list[Duel], ratios: list[KernelRatio]) -> None:
    table = Table(title="Tokens per second, all sequences together")
    for column in ("task", "batch", "with drafts", "without", "ratio", "drafted", "accepted"):
        table.add_column(column)
    for d in duels:
        numbers = (f"{d.on:,.0f}", f"{d.off:,.0f}", f"{d.ratio:.2f}", f"{d.drafted:,}")
        table.add_row(d.task, str(d.batch), *numbers, f"{d.acceptance:.0%}")
    console.print(table)
    table = Table(title="One layer's verification, in times of a decode row of the same batch")
    for column in ("heads", "draft", "grid form", "a state per token"):
        table.add_column(column)
    for r in ratios:
        table.add_row(str(r.nheads), r.draft, f"{r.ours:.2f}", f"{r.per_step:.2f}")
    console.print(table)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-spec", allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=bundled_model_dir())
    parser.add_argument("--text", type=Path, help="passages to answer; default: a bundled one")
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--draft-tokens", type=int, default=SpeculationSection().draft_tokens)
    parser.add_argument("--draft-paths", type=int, default=SpeculationSection().draft_paths)
    parser.add_argument("--output-tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for the plot")
    parser.add_argument("--quick", action="store_true", help="a check that it runs, no figures")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.output_tokens = 1, 48
    return options


if __name__ == "__main__":
    sys.exit(main())
