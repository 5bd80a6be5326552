"""Runs batches through the model. Synchronous: the caller decides on which thread."""

from __future__ import annotations

import numpy as np
import torch

from stateferry.cache.pools import SequencePools
from stateferry.core.sampling import SampledToken
from stateferry.engine.extend_logits import rows_with_logits, take_logits
from stateferry.engine.forward_batch import DecodeBatch, ExtendBatch
from stateferry.engine.freed_memory import keep_freed_memory
from stateferry.engine.sampler import sample
from stateferry.models.caches import LayerCaches
from stateferry.models.model import Model


class ModelRunner:
    """One model over the pools of its sequences. At most one call at a time."""

    def __init__(
        self, model: Model, pools: SequencePools, device: torch.device | str = "cpu"
    ) -> None:
        self._model = model
        self._grid = pools.grid
        self._page_tokens = pools.kv.page_tokens
        self._device = device
        keep_freed_memory()
        self.caches = LayerCaches(states=pools.states.layers, kv=pools.kv.layers)

    @torch.inference_mode()
    def extend(self, batch: ExtendBatch) -> list[SampledToken | None]:
        """Consume the rows' tokens and move their leases. One entry per row that samples, in order;
        None where the logits are not finite."""
        plan, kv_plan = batch.plan(self._grid), batch.kv_plan(self._page_tokens)
        rows = rows_with_logits(batch, plan.cu_seqlens)
        starts = [row.lease.position for row in batch.rows]
        token_ids = self._tokens([t for row in batch.rows for t in row.token_ids])
        logits = self._model.extend(token_ids, plan, kv_plan, self.caches, rows)
        batch.advance(self._grid)
        return take_logits(batch, starts, logits)

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch) -> list[SampledToken | None]:
        """Consume one token per row, commit the tails that became full, move the leases."""
        grid = self._grid
        plan, kv_plan = batch.plan(grid), batch.kv_plan(self._page_tokens)
        token_ids = self._tokens([row.token_id for row in batch.rows])
        logits = self._model.decode(token_ids, plan, kv_plan, self.caches)
        due = batch.commit_plan(grid)
        if due is not None:
            self._model.commit(due, self.caches)
        batch.advance(grid)
        return sample(logits, [row.sample for row in batch.rows])

    def _tokens(self, ids: list[int]) -> torch.Tensor:
        # numpy walks a list two to four times as fast as torch.
        return torch.from_numpy(np.array(ids, dtype=np.int64)).to(self._device)
