"""Models that ship with stateferry, so that every command works without a download."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def bundled_model_dir(name: str = "hybrid_english") -> Path:
    """Return the Hugging Face directory of a bundled model."""
    package = importlib.resources.files(__name__)
    root = Path(str(package))
    available = sorted(path.parent.name for path in root.glob("*/config.json"))
    if name not in available:
        raise ValueError(f"no bundled model named {name!r}; available: {', '.join(available)}")
    return root / name
