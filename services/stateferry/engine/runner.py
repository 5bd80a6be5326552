"""Runs batches through the model. Synchronous: the caller decides on which thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from stateferry.cache.state_pool import StatePool
from stateferry.core.sampling import SampledToken
from stateferry.engine.forward_batch import DecodeBatch, ExtendBatch
from stateferry.engine.sampler import sample
from stateferry_kernels.layer_state import LayerState
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan


class Model(Protocol):
    """What the runner needs of a model."""

    def extend(
        self,
        token_ids: torch.Tensor,
        plan: ExtendPlan,
        states: Sequence[LayerState],
        last_rows: Sequence[int],
    ) -> torch.Tensor: ...

    def decode(
        self, token_ids: torch.Tensor, plan: DecodePlan, states: Sequence[LayerState]
    ) -> torch.Tensor: ...

    def commit(self, plan: CommitPlan, states: Sequence[LayerState]) -> None: ...


class ModelRunner:
    """One model over one state pool. At most one call at a time."""

    def __init__(self, model: Model, pool: StatePool) -> None:
        self._model = model
        self._pool = pool

    @torch.inference_mode()
    def extend(self, batch: ExtendBatch) -> list[SampledToken | None]:
        """Consume the rows' tokens and move their leases. One entry per row that samples, in order;
        None where the logits are not finite."""
        plan = batch.plan(self._pool.grid)
        ends = plan.cu_seqlens[1:]
        wanted = [(end - 1, row.sample) for end, row in zip(ends, batch.rows, strict=True)]
        last_rows = [row_idx for row_idx, spec in wanted if spec is not None]
        token_ids = torch.tensor([t for row in batch.rows for t in row.token_ids])
        logits = self._model.extend(token_ids, plan, self._pool.layers, last_rows)
        batch.advance(self._pool.grid)
        return sample(logits, [spec for _, spec in wanted if spec is not None])

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch) -> list[SampledToken | None]:
        """Consume one token per row, commit the tails that became full, move the leases."""
        token_ids = torch.tensor([row.token_id for row in batch.rows])
        grid = self._pool.grid
        logits = self._model.decode(token_ids, batch.plan(grid), self._pool.layers)
        due = batch.commit_plan(grid)
        if due is not None:
            self._model.commit(due, self._pool.layers)
        batch.advance(grid)
        return sample(logits, [row.sample for row in batch.rows])
