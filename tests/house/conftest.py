"""Where the repository is, and its Python files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sources(repository: Path) -> list[Path]:
    """Every hand-written Python file of both source roots."""
    found = [
        path
        for root in ("services", "kernels")
        for path in sorted((repository / root).rglob("*.py"))
        if repository / "services/stateferry/v1" not in path.parents
    ]
    assert len(found) > 20
    return found
