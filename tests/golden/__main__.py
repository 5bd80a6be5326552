"""``make golden``: nothing that may change how a token is computed changes a bit of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from golden.cases import Prompts, all_cases
from golden.cluster import through_a_cluster
from golden.compare import Engine, PathNotTaken, Tally
from stateferry.bundled import bundled_model_dir
from support.hf_models import BASES
from support.tiny_hybrid import write_tiny_hybrid

BUNDLED = "hybrid_english"
DTYPES = ("float32", "bfloat16")
# Of random models: short enough that a prompt has several intervals.
RANDOM_GRID = 32


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    tallies = []
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        for name in options.models:
            model_dir, grid = _model(name, Path(folder), options.seed)
            for dtype in options.dtypes:
                saved = options.out / f"{name}-{dtype}-{options.seed}.json"
                tally = _saved(saved) if options.resume else None
                if tally is None:
                    tally = _run(name, model_dir, dtype, grid, options)
                    saved.write_text(json.dumps(vars(tally)), encoding="utf-8")
                tallies.append(tally)
                seconds = time.perf_counter() - started
                print(
                    f"{name} {dtype}: {tally.comparisons} comparisons, "
                    f"{len(tally.mismatches)} mismatches; {seconds:.0f} s",
                    flush=True,
                )
    paths: Counter[str] = sum((tally.paths for tally in tallies), Counter())
    mismatches = [text for tally in tallies for text in tally.mismatches]
    for text in mismatches[:20]:
        print(f"MISMATCH {text}")
    result = {
        "comparisons": sum(tally.comparisons for tally in tallies),
        "mismatches": len(mismatches),
        "paths": dict(sorted(paths.items())),
        "models": options.models,
        "dtypes": options.dtypes,
        "seed": options.seed,
        "numerics": "exact",
        "wall_s": round(time.perf_counter() - started, 1),
    }
    print("RESULT " + json.dumps(result))
    return 1 if mismatches else 0


def _run(name: str, model_dir: Path, dtype: str, grid: int, options: argparse.Namespace) -> Tally:
    tally = Tally()
    for round_ in range(options.rounds):
        for overlap, variant in ((False, "in turn"), (True, "overlapped")):
            make, part = partial(Engine, model_dir, dtype, grid, overlap=overlap), Tally()
            prompts = Prompts(make(cached=False).vocab_size, options.seed + round_)
            for case in all_cases(make, prompts, part):
                so_far = tally.comparisons + part.comparisons
                print(f"{name} {dtype}, {variant}: {case}, {so_far} so far", flush=True)
            tally.add(part, variant)
    asyncio.run(through_a_cluster(model_dir, dtype, grid, options.seed, tally))
    return tally


def _model(name: str, folder: Path, seed: int) -> tuple[Path, int]:
    if name == BUNDLED:
        return bundled_model_dir(BUNDLED), 64
    if Path(name).is_dir():
        return Path(name), 64
    model_dir = folder / name
    return write_tiny_hybrid(model_dir, name, seed), RANDOM_GRID


def _saved(path: Path) -> Tally | None:
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Tally(values["comparisons"], values["mismatches"], Counter(values["paths"]))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make golden ARGS=..", description=__doc__, allow_abbrev=False
    )
    everything = [BUNDLED, *BASES]
    parser.add_argument(
        "--models", nargs="+", default=everything, help=f"{', '.join(everything)}, or directories"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="other prompts each time")
    parser.add_argument("--resume", action="store_true", help="keep models that are done")
    parser.add_argument("--out", type=Path, default=Path("out/golden"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PathNotTaken as error:
        sys.exit(f"a hazard was not met: {error}")
