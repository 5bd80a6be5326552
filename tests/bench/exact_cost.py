"""What exact numerics cost: an engine of ``model.numerics = exact`` against one of ``fast``.

PYTHONPATH=tests python -P -m bench.exact_cost MODEL_DIR [--dtype bfloat16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.own_engine import run_timed, uncached_engine
from stateferry.config import ModelSection, WorkerSection

MODES = ("exact", "fast")


@dataclass(frozen=True)
class Case:
    """So many prompts of so many tokens, continued by so many. ``counts_prompt``: the time to the
    first token counts; else what comes after it."""

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    counts_prompt: bool


# 64 steps: a whole interval of the grid, so that commits count as often as they happen.
CASES = (
    Case("prefill_512", 1, 512, 1, True),
    Case("prefill_2048", 1, 2048, 1, True),
    Case("decode_1", 1, 32, 65, False),
    Case("decode_8", 8, 32, 65, False),
)


def exact_cost(
    model_dir: Path,
    *,
    rounds: int,
    dtype: str = "float32",
    threads: int | None = None,
    cases: tuple[Case, ...] = CASES,
) -> dict[str, Any]:
    """Measure both modes of one model, both engines loaded, taking turns within each round.

    Where an engine's memory lies shifts its rate by some per cent, also where both modes run the
    same code (decode): so each measurement is made twice, with engines loaded in either order.

    Returns for each case tokens/s of either mode (medians) and ``exact_cost``: 1 - exact / fast,
    the median over rounds, then the mean of both loads, below 0 where exact is the faster one.
    Beside them the largest of the cases' under ``exact_cost``, and the two modes' ``numerics``.
    """
    longest = max(case.prompt_tokens + case.new_tokens for case in cases) + 1
    batch = max(case.batch for case in cases)
    threads = threads or len(os.sched_getaffinity(0))
    rates: dict[str, dict[str, list[float]]] = {
        case.name: {mode: [] for mode in MODES} for case in cases
    }
    costs: dict[str, list[float]] = {case.name: [] for case in cases}
    numerics: dict[str, str] = {}
    for order in (MODES, MODES[::-1]):
        engines = {mode: _Engine(model_dir, mode, dtype, threads, longest, batch) for mode in order}
        numerics = {mode: engines[mode].numerics for mode in MODES}
        for case in cases:
            found = _take_turns(engines, case, rounds)
            pairs = zip(found["exact"], found["fast"], strict=True)
            costs[case.name].append(statistics.median(1 - e / f for e, f in pairs))
            for mode in MODES:
                rates[case.name][mode] += found[mode]
    result = {
        name: {
            **{f"{mode}_tokens_per_s": statistics.median(of_case[mode]) for mode in MODES},
            "exact_cost": statistics.mean(costs[name]),
        }
        for name, of_case in rates.items()
    }
    worst = max(values["exact_cost"] for values in result.values())
    return {"exact_cost": worst, "cases": result, "numerics": numerics}


def _take_turns(engines: dict[str, _Engine], case: Case, rounds: int) -> dict[str, list[float]]:
    """Rates by mode and round; the first round, which warms up, does not count."""
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode in MODES if number % 2 else reversed(MODES):
            rate = engines[mode].tokens_per_s(case, number)
            if number:
                rates[mode].append(rate)
    return rates


class _Engine:
    """The one-process engine in one mode, without a cache: every prompt is computed."""

    def __init__(
        self,
        model_dir: Path,
        mode: str,
        dtype: str,
        threads: int,
        context: int,
        batch: int,
    ) -> None:
        self._engine, parts = uncached_engine(
            model_dir,
            ModelSection(dtype=dtype, numerics=mode, max_context_tokens=context),
            WorkerSection(max_requests=batch, threads=threads),
        )
        self._vocab_size = parts.limits.vocab_size
        self.numerics = parts.fingerprint.numerics

    def tokens_per_s(self, case: Case, seed: int) -> float:
        """Run the case once; the same seed gives the same prompts."""
        rng = random.Random(seed)
        prompts = [
            [rng.randrange(self._vocab_size) for _ in range(case.prompt_tokens)]
            for _ in range(case.batch)
        ]
        timed = run_timed(self._engine, prompts, case.new_tokens)
        if case.counts_prompt:
            return case.batch * case.prompt_tokens / timed.first_s
        return timed.rest_tokens / timed.rest_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    found = exact_cost(
        options.model_dir, rounds=options.rounds, dtype=options.dtype, threads=options.threads
    )
    for name, values in found["cases"].items():
        print(
            f"{name:14s} exact {values['exact_tokens_per_s']:9.1f} tokens/s"
            f"  fast {values['fast_tokens_per_s']:9.1f}  cost {values['exact_cost']:+.3f}"
        )
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
