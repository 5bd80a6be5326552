"""Set before any test module imports torch or triton: idle OpenMP threads sleep, one thread per
operation; Triton interprets where there is no GPU."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it once. Without a GPU its kernels run under its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native-dir",
        type=Path,
        metavar="DIR",
        help="load the C++ library from here, for example a build with sanitizers",
    )


def pytest_configure(config: pytest.Config) -> None:
    directory: Path | None = config.getoption("--native-dir")
    if directory is None:
        return
    from stateferry_kernels.native.library import native, use_directory

    use_directory(directory.resolve())
    # Asked for by name, so a run on anything else would be a wrong answer.
    native()
