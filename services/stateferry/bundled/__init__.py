"""The model that ships with the package, and the recipe that made it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def bundled_model_dir(name: str = "mamba2_english") -> Path:
    """Directory of a bundled model."""
    return Path(str(resources.files(__name__) / name))
