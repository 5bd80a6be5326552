"""Compiles the library, once for each kind of processor. Standard library alone: setup.py runs it.

``python -m stateferry_kernels.native.build DIR`` builds what `pip install` does; ``--sanitize`` for
the address and undefined-behaviour sanitizers, ``--portable`` for the plain C++ form of the vector
operations, which serves processors that have no form of their own and checks the others.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SOURCE = Path(__file__).parent / "src"

# One rounding per written operation: where a product is fused into a sum, the source says so.
_COMMON = (
    "-std=c++20 -fPIC -shared -pthread -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-Wall -Wextra -Wno-maybe-uninitialized"
).split()
_OPTIMISE = ["-O3"]
_SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined".split()

_X86_V3 = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mmovbe".split()
# Variant of library.py -> flags, by machine.
FLAGS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "x86_64_v3": _X86_V3,
        "x86_64_v4": ["-march=x86-64-v4"],
        "x86_64_v4_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    },
    "aarch64": {"aarch64": ["-march=armv8.2-a", "-O3"]},
}


class BuildFailed(RuntimeError):
    """The compiler is missing or refused; the message has its words."""


def compiler() -> str:
    """The system's C++ compiler. Raises BuildFailed when there is none."""
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise BuildFailed("no C++ compiler: looked for c++, g++ and clang++")


def build(
    directory: Path,
    *,
    sanitize: bool = False,
    portable: bool = False,
    only: str | None = None,
    stale_only: bool = False,
) -> list[Path]:
    """Compile every variant for this machine into ``directory``, or ``only`` that one; returns the
    files.

    ``portable`` makes each variant from the plain C++ form; ``stale_only`` leaves alone what is
    newer than all sources. Raises BuildFailed.
    """
    known = FLAGS.get(platform.machine(), {})
    variants = {name: flags for name, flags in known.items() if only in (None, name)}
    if not variants:
        raise BuildFailed(f"no variant {only or ''} for {platform.machine()}".replace("  ", " "))
    program = compiler()
    directory.mkdir(parents=True, exist_ok=True)
    changed = max(file.stat().st_mtime for file in (*_SOURCE.iterdir(), Path(__file__)))

    def compile_one(variant: str) -> Path:
        target = directory / f"libstateferry_{variant}.so"
        if stale_only and target.exists() and target.stat().st_mtime > changed:
            return target
        part = target.with_suffix(".part")
        command = [program, *_COMMON, *(_SANITIZE if sanitize else _OPTIMISE)]
        command += [*variants[variant], *(["-DSF_PORTABLE", "-O3"] if portable else [])]
        command += [str(_SOURCE / "library.cpp"), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildFailed(f"{' '.join(command)}\n{done.stderr}")
        # A library that a running process has mapped is replaced, never rewritten.
        part.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(compile_one, variants))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--only", metavar="VARIANT")
    arguments = parser.parse_args()
    try:
        build(
            arguments.directory,
            sanitize=arguments.sanitize,
            portable=arguments.portable,
            only=arguments.only,
        )
    except BuildFailed as error:
        sys.exit(f"the CPU kernels were not built: {error}")


if __name__ == "__main__":
    main()
