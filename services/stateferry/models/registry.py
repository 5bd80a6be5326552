"""Architecture name -> model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from stateferry.core.errors import ModelError
from stateferry.models.bamba.config import bamba_config
from stateferry.models.bamba.model import load_bamba
from stateferry.models.falcon_h1.config import falcon_h1_config
from stateferry.models.falcon_h1.model import load_falcon_h1
from stateferry.models.granite_hybrid.config import granite_hybrid_config
from stateferry.models.granite_hybrid.model import load_granite_hybrid
from stateferry.models.mamba2.config import mamba2_config
from stateferry.models.mamba2.model import load_mamba2
from stateferry.models.model import Model
from stateferry.models.nemotron_h.config import nemotron_h_config
from stateferry.models.nemotron_h.model import load_nemotron_h
from stateferry.models.options import Raw, read_config
from stateferry.models.weights import Progress, WeightTable
from stateferry_kernels.operations import Kernels

_DTYPES = (torch.float32, torch.bfloat16)

_Config = TypeVar("_Config")
_Loader = Callable[[Path, Raw, WeightTable, Kernels, Progress | None], Model]


def load_model(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    kernels: Kernels,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Load a Hugging Face directory as it is. Raises ModelError naming what we cannot serve."""
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype} is not supported; supported: float32, bfloat16")
    raw = read_config(model_dir)
    table = WeightTable(dtype, device, keep_narrow=kernels.widens_weights)
    return _LOADERS[architecture_of(raw)](model_dir, raw, table, kernels, progress)


def architecture_of(raw: Raw) -> str:
    """The architecture to build. Raises ModelError listing what is supported."""
    named = raw.get("architectures") or []
    for name in named:
        if name in _LOADERS:
            return str(name)
    supported = ", ".join(_LOADERS)
    raise ModelError(f"architectures {named} are not supported; supported: {supported}")


def _loader(
    parse: Callable[[Raw], _Config],
    load: Callable[[Path, _Config, WeightTable, Kernels, Progress | None], Model],
) -> _Loader:
    def loader(
        model_dir: Path,
        raw: Raw,
        table: WeightTable,
        kernels: Kernels,
        progress: Progress | None,
    ) -> Model:
        return load(model_dir, parse(raw), table, kernels, progress)

    return loader


_LOADERS: dict[str, _Loader] = {
    "Mamba2ForCausalLM": _loader(mamba2_config, load_mamba2),
    "NemotronHForCausalLM": _loader(nemotron_h_config, load_nemotron_h),
    "FalconH1ForCausalLM": _loader(falcon_h1_config, load_falcon_h1),
    "GraniteMoeHybridForCausalLM": _loader(granite_hybrid_config, load_granite_hybrid),
    "BambaForCausalLM": _loader(bamba_config, load_bamba),
}

SUPPORTED_ARCHITECTURES = tuple(_LOADERS)
