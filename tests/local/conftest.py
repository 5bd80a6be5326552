"""Clusters of stub processes, which start in a tenth of the real ones' time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from stateferry.config import load_config
from stateferry.local import LocalCluster

STUB = Path(__file__).with_name("stub_child.py")


def stub_command(behaviours: Mapping[str, str]) -> Callable[[str, Path], list[str]]:
    def command(role: str, ready_file: Path) -> list[str]:
        behaviour = behaviours.get(role, "obey")
        arguments = [role, str(ready_file), str(os.getpid()), behaviour]
        return [sys.executable, "-P", str(STUB), *arguments]

    return command


@pytest.fixture
def new_cluster() -> Callable[..., LocalCluster]:
    """``new_cluster(prefill="crash", ...)``; ``options`` go to LocalCluster, but ``settings``."""

    def build(options: Mapping[str, Any] | None = None, **behaviours: str) -> LocalCluster:
        names = frozenset({"prefill-0", "decode-0", "decode-1"})
        given: dict[str, Any] = {"decode": 2, "roster": lambda address: names, **(options or {})}
        settings = given.pop("settings", {})
        config = load_config(overrides={"router.port": 0, **settings}, environ={})
        return LocalCluster(config, command=stub_command(behaviours), **given)

    return build
