"""``make test-faults``: workers are killed, stopped and restarted, and no client can tell."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time

from tokenizers import Tokenizer

from faults.outcome import Outcome, p99
from faults.scenarios import SCENARIOS, Setting
from stateferry.bundled import bundled_model_dir

MODELS = ("hybrid_english", "mamba2_english")
# These are the same from one seed to the next, but for the prompts.
_ONCE = ("without_failover", "stopped", "rolling_restart", "aborts")


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    for model in options.models:
        for seed in range(options.seed, options.seed + options.seeds):
            for name in options.scenarios:
                if name in _ONCE and seed != options.seed:
                    continue
                outcomes.append(asyncio.run(SCENARIOS[name](_setting(options, model, seed))))
                _report(outcomes[-1], model, seed, time.perf_counter() - started)
    print("RESULT", json.dumps(result_of(outcomes)))
    return 0 if all(outcome.is_clean for outcome in outcomes) else 1


def result_of(outcomes: list[Outcome]) -> dict[str, object]:
    """What the last line says."""
    return {
        "scenarios": len(outcomes),
        "streams": sum(outcome.streams for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
        "duplicated": sum(outcome.duplicated for outcome in outcomes),
        "mismatches": sum(outcome.mismatches for outcome in outcomes),
        "disturbed": sum(outcome.disturbed for outcome in outcomes),
        "stall_p99_s": round(p99(s for outcome in outcomes for s in outcome.stalls_s), 3),
        "problems": [
            f"{outcome.name}: {text}" for outcome in outcomes for text in outcome.problems
        ],
    }


def _report(outcome: Outcome, model: str, seed: int, seconds: float) -> None:
    print(
        f"{outcome.name}, {model}, seed {seed}: {outcome.streams} streams, {outcome.disturbed} of "
        f"them went on elsewhere, {outcome.lost} lost, {outcome.duplicated} doubled, "
        f"{outcome.mismatches} differ, longest stalls {p99(outcome.stalls_s):.2f} s; "
        f"{seconds:.0f} s",
        flush=True,
    )
    for text in outcome.problems[:5]:
        print(f"  PROBLEM {text}", flush=True)


def _setting(options: argparse.Namespace, model: str, seed: int) -> Setting:
    model_dir = bundled_model_dir(model)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return Setting(
        model_dir=model_dir,
        vocab=Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab_size(),
        grid=config["chunk_size"],
        seed=seed,
        streams=options.streams,
        tokens=config["chunk_size"] + 32,
        scale=0.03 if options.quick else 1.0,
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make test-faults", allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one model, one seed, few streams")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.seeds = options.models[:1], 1
        options.streams = min(options.streams, 16)
    return options


if __name__ == "__main__":
    sys.exit(main())
