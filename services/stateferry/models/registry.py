"""Architecture name -> model."""

from __future__ import annotations

from pathlib import Path

import torch

from stateferry.models.config import architecture_of, mamba2_config, read_config
from stateferry.models.mamba2 import Mamba2Model, load_mamba2
from stateferry.models.weights import Progress
from stateferry_kernels.dispatch import Kernels


def load_model(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    kernels: Kernels,
    progress: Progress | None = None,
) -> Mamba2Model:
    """Load a Hugging Face directory as it is. Raises ModelError naming what we cannot serve."""
    raw = read_config(model_dir)
    architecture_of(raw)
    return load_mamba2(model_dir, mamba2_config(raw), dtype, kernels, progress)
