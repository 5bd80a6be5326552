"""The engine that every worker is assembled around: model, pools and runner."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stateferry.cache.pools import build_pools, layout_fingerprint
from stateferry.cache.sizing import page_bytes, size_pools, tail_bytes
from stateferry.cache.state_cache import StateCache
from stateferry.config import (
    AUTO_BYTES,
    NO_SPECULATION,
    CacheSection,
    ModelSection,
    SpeculationSection,
    WorkerSection,
)
from stateferry.core.eos import read_eos_token_ids
from stateferry.core.errors import ConfigError, InvariantViolation, ModelError
from stateferry.core.fingerprint import PROTOCOL_VERSION, Fingerprint
from stateferry.core.sampling import SamplingParams
from stateferry.core.weight_files import weights_fingerprint
from stateferry.core.worker import PoolSizes
from stateferry.drafting.speculator import Speculator
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    SampleSpec,
)
from stateferry.engine.rules import RulesMaker
from stateferry.engine.runner import Drafts, ModelRunner
from stateferry.guided.compiler import GuideCompiler
from stateferry.models.model import Model
from stateferry.models.registry import load_model
from stateferry.worker.device import pick_device, steps_in_flight, wants_graphs
from stateferry.worker.drafting import most_guesses, room_for_drafts, speculator
from stateferry.worker.limits import ModelLimits
from stateferry.worker.memory import automatic_budget_bytes, automatic_cache_bytes
from stateferry.worker.reuse import reuse_of
from stateferry_kernels.dispatch import without_row_independence
from stateferry_kernels.operations import Kernels

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUMERICS = ("exact", "fast")


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A loaded model with memory for ``sizes.sequences`` sequences."""

    runner: ModelRunner
    cache: StateCache
    sizes: PoolSizes
    grid: int
    fingerprint: Fingerprint
    limits: ModelLimits
    rules: RulesMaker
    kernels: str
    steps_in_flight: Literal[1, 2]
    speculator: Speculator | None = None


def build_engine(
    model_dir: Path,
    model: ModelSection,
    worker: WorkerSection,
    cached: CacheSection,
    progress: Callable[[int, int], None] | None = None,
    speculation: SpeculationSection = NO_SPECULATION,
) -> EngineParts:
    """Load the model and size its pools. ``progress`` gets (bytes loaded, bytes in all).

    Sets torch's thread count. Raises ConfigError or ModelError.
    """
    if model.dtype not in _DTYPES:
        raise ConfigError("model.dtype", f"{model.dtype!r} is none of {', '.join(_DTYPES)}")
    dtype = _DTYPES[model.dtype]
    torch.set_num_threads(worker.threads)
    device, kernels = pick_device(worker)
    kernels = _with_numerics(kernels, model.numerics)
    in_flight = steps_in_flight(worker, device)
    loaded = load_model(model_dir, dtype=dtype, kernels=kernels, device=device, progress=progress)
    grid = model.grid_tokens or loaded.chunk_size
    weights = weights_fingerprint(model_dir)
    layout = layout_fingerprint(
        loaded.state_geometry, loaded.kv_geometry, grid=grid, page_tokens=grid, dtype=dtype
    )
    guesses = most_guesses(speculation, grid)
    reuse = reuse_of(cached, loaded, grid, weights, layout, draft_tokens=guesses)
    sizes = _sizes(
        loaded, model, worker, cached, grid, device, room_for_drafts(speculation, grid, 1)
    )
    _report(sizes)
    runner = _runner(
        loaded,
        sizes,
        device,
        drafts=room_for_drafts(speculation, grid, sizes.sequences),
        graphs_up_to_tokens=(
            model.max_context_tokens if wants_graphs(worker, device, kernels) else 0
        ),
    )
    cache = StateCache(runner.pools, sizes, reuse)
    if runner.graphs is not None:
        runner.graphs.capture(sizes.sequences)
    _try_out(runner, cache, min(grid + 1, model.max_context_tokens - 1))
    return EngineParts(
        runner=runner,
        cache=cache,
        sizes=sizes,
        grid=grid,
        fingerprint=Fingerprint(
            protocol=PROTOCOL_VERSION,
            model=model.name or model_dir.name,
            weights=weights,
            layout=layout,
            grid=grid,
            dtype=model.dtype,
            numerics=kernels.numerics,
        ),
        limits=ModelLimits(loaded.vocab_size, model.max_context_tokens),
        rules=_rules(model_dir, loaded.vocab_size),
        kernels=kernels.name,
        # What a verification will accept is known when it is over.
        steps_in_flight=1 if guesses else in_flight,
        speculator=speculator(speculation, grid),
    )


def _runner(
    loaded: Model,
    sizes: PoolSizes,
    device: torch.device,
    *,
    drafts: Drafts | None,
    graphs_up_to_tokens: int,
) -> ModelRunner:
    """Over pools of its own. The grid is as long as a page."""
    pools = build_pools(
        loaded.state_geometry,
        loaded.kv_geometry,
        sizes,
        grid=sizes.kv_page_tokens,
        dtype=loaded.dtype,
        device=device,
        draft_pages=0 if drafts is None else drafts.kv_pages,
    )
    return ModelRunner(
        loaded, pools, device, graphs_up_to_tokens=graphs_up_to_tokens, drafts=drafts
    )


def _with_numerics(kernels: Kernels, numerics: str) -> Kernels:
    if numerics not in NUMERICS:
        raise ConfigError("model.numerics", f"{numerics!r} is none of {', '.join(NUMERICS)}")
    if numerics == "exact":
        return kernels
    try:
        return without_row_independence(kernels)
    except ValueError as error:
        raise ConfigError("model.numerics", f"{numerics!r}: {error}") from error


def _rules(model_dir: Path, vocab_size: int) -> RulesMaker:
    eos_token_ids = read_eos_token_ids(model_dir, vocab_size)
    guides = GuideCompiler(model_dir / "tokenizer.json", vocab_size, eos_token_ids)
    guides.load()
    return RulesMaker(guides)


def _sizes(
    loaded: Model,
    model: ModelSection,
    worker: WorkerSection,
    cached: CacheSection,
    grid: int,
    device: torch.device,
    draft: Drafts | None,
) -> PoolSizes:
    """draft: of one sequence."""
    cache_bytes = cached.memory_bytes
    if cache_bytes == AUTO_BYTES:
        cache_bytes = automatic_cache_bytes(device)
    draft_bytes = 0
    if draft is not None:
        draft_bytes = worker.max_requests * (
            tail_bytes(loaded.state_geometry, draft.rows, loaded.dtype)
            + draft.kv_pages * page_bytes(loaded.kv_geometry, grid, loaded.dtype)
        )
    return size_pools(
        loaded.state_geometry,
        loaded.kv_geometry,
        grid=grid,
        dtype=loaded.dtype,
        max_sequences=worker.max_requests,
        max_context_tokens=model.max_context_tokens,
        budget_bytes=(
            worker.memory_bytes or automatic_budget_bytes(device, worker.workers_per_machine)
        )
        - draft_bytes,
        cache_bytes=cache_bytes if cached.enabled else 0,
        tokens_per_state=cached.tokens_per_state,
    )


def _report(sizes: PoolSizes) -> None:
    log.info(
        "memory for %d sequences, %.1f MB: %d state slots of %d bytes, %d tail pages of %d bytes, "
        "%d KV pages of %d bytes and %d tokens",
        sizes.sequences,
        sizes.size_bytes / 1e6,
        sizes.state_slots,
        sizes.state_slot_bytes,
        sizes.tail_pages,
        sizes.tail_page_bytes,
        sizes.kv_pages,
        sizes.kv_page_bytes,
        sizes.kv_page_tokens,
    )


def _try_out(runner: ModelRunner, cache: StateCache, prompt_len: int) -> None:
    """Run one prompt and one decode row, before anybody is told to come.

    It also pays for what a process does only once. Raises ModelError when no token comes out.
    """
    spec = SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), index=0)
    if not cache.reserve("try-out", num_tokens=prompt_len + 1):
        raise InvariantViolation("the pools of an idle worker are full")
    lease = cache.lease("try-out")
    tokens = runner.extend(ExtendBatch((ExtendRow(lease, (0,) * prompt_len, spec),)))()
    tokens += runner.decode(DecodeBatch((DecodeInput(lease, 0, spec),)))()
    cache.release("try-out")
    if None in tokens:
        raise ModelError("the model gives logits that are not finite")
