"""Architecture name -> model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stateferry.core.errors import ModelError
from stateferry.models.config import architecture_of, mamba2_config, read_config
from stateferry.models.mamba2 import Mamba2Model, load_mamba2
from stateferry.models.weights import Progress
from stateferry_kernels.operations import Kernels

_DTYPES = (torch.float32, torch.bfloat16)

_Loader = Callable[
    [Path, Mapping[str, Any], torch.dtype, Kernels, Progress | None],
    Mamba2Model,
]


def load_model(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    kernels: Kernels,
    progress: Progress | None = None,
) -> Mamba2Model:
    """Load a Hugging Face directory as it is. Raises ModelError naming what we cannot serve."""
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype} is not supported; supported: float32, bfloat16")
    raw = read_config(model_dir)
    return _LOADERS[architecture_of(raw)](model_dir, raw, dtype, kernels, progress)


def _load_mamba2(
    model_dir: Path,
    raw: Mapping[str, Any],
    dtype: torch.dtype,
    kernels: Kernels,
    progress: Progress | None,
) -> Mamba2Model:
    return load_mamba2(model_dir, mamba2_config(raw), dtype, kernels, progress)


# Its keys are config.SUPPORTED_ARCHITECTURES.
_LOADERS: dict[str, _Loader] = {"Mamba2ForCausalLM": _load_mamba2}
