"""Real clusters of real processes over a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stateferry.config import load_config
from stateferry.local import LocalCluster
from support.tiny_model import write_tiny_model

GRID = 32


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", chunk_size=GRID)


def new_cluster(
    model_dir: Path, *, prefill: int = 1, decode: int = 1, **settings: object
) -> LocalCluster:
    """``settings`` are keys of the configuration, with ``__`` for the dot."""
    config = load_config(
        overrides={
            "model.dir": str(model_dir),
            "model.grid_tokens": GRID,
            "router.port": 0,
            "worker.max_requests": 24,
            "worker.extend_budget_tokens": 128,
            # Off on a CPU by default, and the harder way to be right.
            "worker.overlap": "on",
        }
        | {key.replace("__", "."): value for key, value in settings.items()},
        environ={},
    )
    return LocalCluster(config, prefill=prefill, decode=decode)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path) -> Iterator[LocalCluster]:
    """Shared by the tests of one module, none of which may hurt it."""
    with new_cluster(tiny_model) as running:
        yield running
        assert running.deaths == ()


@pytest.fixture
def own_cluster(tiny_model: Path) -> Iterator[LocalCluster]:
    """For a test that kills something, and looks at what becomes of a single attempt."""
    with new_cluster(tiny_model, router__max_attempts=1) as running:
        yield running
