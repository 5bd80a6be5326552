"""The engine that every worker is assembled around: model, pools and runner."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from stateferry.cache import state_cache
from stateferry.cache.state_cache import StateCache
from stateferry.cache.state_pool import StatePool, layout_fingerprint
from stateferry.config import ModelSection, WorkerSection
from stateferry.core.errors import ConfigError, ModelError
from stateferry.core.fingerprint import PROTOCOL_VERSION, Fingerprint
from stateferry.core.sampling import SamplingParams
from stateferry.core.weight_files import weights_fingerprint
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    SampleSpec,
)
from stateferry.engine.runner import ModelRunner
from stateferry.models.registry import load_model
from stateferry.worker.limits import ModelLimits
from stateferry_kernels.dispatch import BackendUnavailable, select_kernels

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A loaded model with memory for ``max_requests`` sequences."""

    runner: ModelRunner
    cache: StateCache
    grid: int
    fingerprint: Fingerprint
    limits: ModelLimits
    kernels: str


def build_engine(
    model_dir: Path,
    model: ModelSection,
    worker: WorkerSection,
    progress: Callable[[int, int], None] | None = None,
) -> EngineParts:
    """Load the model and size its pools. ``progress`` gets (bytes loaded, bytes in all).

    Sets torch's thread count. Raises ConfigError or ModelError.
    """
    if model.dtype not in _DTYPES:
        raise ConfigError("model.dtype", f"{model.dtype!r} is none of {', '.join(_DTYPES)}")
    dtype = _DTYPES[model.dtype]
    torch.set_num_threads(worker.threads)
    try:
        kernels = select_kernels(None if worker.kernels == "auto" else worker.kernels)
    except (ValueError, BackendUnavailable) as error:
        raise ConfigError("worker.kernels", str(error)) from error
    loaded = load_model(model_dir, dtype=dtype, kernels=kernels, progress=progress)
    grid = model.grid_tokens or loaded.config.chunk_size
    pool = StatePool(
        loaded.config.geometry,
        grid=grid,
        dtype=dtype,
        num_slots=state_cache.num_slots(worker.max_requests),
        num_pages=state_cache.num_pages(worker.max_requests),
    )
    log.info("state pools: %d sequences, %.1f MB", worker.max_requests, pool.size_bytes() / 1e6)
    runner, cache = ModelRunner(loaded, pool), StateCache(pool, worker.max_requests)
    _try_out(runner, cache, grid)
    return EngineParts(
        runner=runner,
        cache=cache,
        grid=grid,
        fingerprint=Fingerprint(
            protocol=PROTOCOL_VERSION,
            model=model.name or model_dir.name,
            weights=weights_fingerprint(model_dir),
            layout=layout_fingerprint(loaded.config.geometry, grid, dtype),
            grid=grid,
            dtype=model.dtype,
            numerics=kernels.numerics,
        ),
        limits=ModelLimits(loaded.config.vocab_size, model.max_context_tokens),
        kernels=kernels.name,
    )


def _try_out(runner: ModelRunner, cache: StateCache, grid: int) -> None:
    """Run one prompt across a grid point and one decode row, before anybody is told to come.

    It also pays for what a process does only once. Raises ModelError when no token comes out.
    """
    spec = SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), index=0)
    cache.reserve("try-out")
    lease = cache.lease("try-out")
    tokens = runner.extend(ExtendBatch((ExtendRow(lease, (0,) * (grid + 1), spec),)))
    tokens += runner.decode(DecodeBatch((DecodeInput(lease, 0, spec),)))
    cache.release("try-out")
    if None in tokens:
        raise ModelError("the model gives logits that are not finite")
