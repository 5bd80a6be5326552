"""The kernels' and the engine's tests on this GPU, as a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

_TESTS = Path(__file__).parents[2]
# test_triton_compiles compiles for a GPU that is absent.
_PATTERNS = tuple(
    f"kernels/test_{name}.py" for name in ("gpu_*", "triton_[!c]*", "triton_conv", "parity_*")
)
_ENGINE = ("engine/test_gpu_*.py", "engine/test_replayed_steps.py")


def run(log: Path, workers: int) -> dict[str, int]:
    """Counts by outcome, for example {"passed": 900, "skipped": 3}; the whole output in ``log``."""
    # The slowest first.
    files = [str(path) for pattern in (*_ENGINE, *_PATTERNS) for path in _TESTS.glob(pattern)]
    if find_spec("llguidance") is None:
        # Without it there is no engine.
        files = [file for file in files if "/engine/" not in file]
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--timeout", "300"]
    if find_spec("xdist") is not None:
        options += ["-n", str(workers)]
    # The other backends have no part in it.
    options += ["-k", "not (cpu or torch) or triton or gpu_engine"]
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-P", "-m", "pytest", *options, *files],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", log.read_text()[-400:])
    return {outcome: int(count) for count, outcome in counts}
