"""Compiles the CPU kernels while installing; all else about the package is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

NATIVE = Path(__file__).parent / "kernels/stateferry_kernels/native"


class BuildWithKernels(build_py):
    """Into the source tree for an editable install, into the wheel otherwise."""

    def run(self) -> None:
        super().run()
        spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
        assert spec is not None and spec.loader is not None
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        editable = getattr(self, "editable_mode", False)
        target = NATIVE if editable else Path(self.build_lib) / "stateferry_kernels/native"
        try:
            # Installing one more extra finds the kernels there already.
            builder.build(target, stale_only=editable)
        except builder.BuildFailed as error:
            # Serving still works on torch operations, and says at start what that costs.
            print(f"warning: the CPU kernels were not built: {error}", file=sys.stderr)


class PlatformDistribution(Distribution):
    """The wheel holds compiled code, although no Python extension."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)
