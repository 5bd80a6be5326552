"""The suite in several processes: where a process's memory lies shifts all of its ratios."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_RESULT = "RESULT "


class ProcessFailed(Exception):
    """One of the runs has no result."""


def run_processes(arguments: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Results of ``count`` runs, one after the other; what they print is passed on."""
    return [_run([*arguments, "--processes", "1"]) for _ in range(count)]


def _run(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "bench.kernels", *arguments]
    found = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(_RESULT):
                found = json.loads(line.removeprefix(_RESULT))
            else:
                print(line, end="", flush=True)
    if child.returncode or found is None:
        raise ProcessFailed(f"a run ended with {child.returncode}")
    result: dict[str, Any] = found
    return result


def medians(results: Sequence[Any]) -> Any:
    """Of values of one structure: of each number the median, of anything else the first."""
    first = results[0]
    if isinstance(first, dict):
        return {key: medians([result[key] for result in results]) for key in first}
    if isinstance(first, float):
        return statistics.median(results)
    return first
