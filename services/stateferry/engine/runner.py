"""Runs batches through the model. Synchronous: the caller decides on which thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from stateferry.cache.page_copies import run_copies
from stateferry.cache.pools import SequencePools
from stateferry.core.sampling import SampledToken
from stateferry.engine.extend_logits import (
    keep_finals,
    known_final,
    rows_with_logits,
    take_logits,
)
from stateferry.engine.forward_batch import DecodeBatch, ExtendBatch
from stateferry.engine.freed_memory import keep_freed_memory
from stateferry.engine.sampler import sample
from stateferry.models.caches import LayerCaches
from stateferry.models.model import Model
from stateferry_kernels.device_tables import device_array
from stateferry_kernels.plans import CommitPlan

if TYPE_CHECKING:
    from stateferry.engine.decode_graphs import DecodeGraphs


class ModelRunner:
    """One model over the pools of its sequences. At most one call at a time."""

    def __init__(
        self,
        model: Model,
        pools: SequencePools,
        device: torch.device | str = "cpu",
        *,
        graphs_up_to_tokens: int = 0,
    ) -> None:
        """graphs_up_to_tokens: whether decode steps run as CUDA graphs, for sequences of at most so
        many tokens; on the Triton backend and a GPU alone. 0: they do not."""
        self._model = model
        self._pools = pools
        self._grid = pools.grid
        self._page_tokens = pools.kv.page_tokens
        self._device = torch.device(device)
        keep_freed_memory()
        self.caches = LayerCaches(states=pools.states.layers, kv=pools.kv.layers)
        self.graphs: DecodeGraphs | None = None
        if graphs_up_to_tokens:
            # Imported late: Triton is not everywhere.
            from stateferry.engine.decode_graphs import DecodeGraphs

            self.graphs = DecodeGraphs(
                model, self.caches, page_tokens=self._page_tokens, longest=graphs_up_to_tokens
            )

    @torch.inference_mode()
    def extend(self, batch: ExtendBatch) -> list[SampledToken | None]:
        """Consume the rows' tokens and move their leases. One entry per row that samples, in order;
        None where the logits are not finite."""
        run_copies(self._pools, batch.copies)
        starts = [row.lease.position for row in batch.rows]
        if batch.computed:
            plan, kv_plan = batch.plan(self._grid), batch.kv_plan(self._page_tokens)
            rows = rows_with_logits(batch, plan.cu_seqlens)
            token_ids = self._tokens([t for row in batch.computed for t in row.token_ids])
            hidden = self._model.extend(token_ids, plan, kv_plan, self.caches, rows)
            batch.advance(self._grid)
            hidden = keep_finals(batch, hidden)
        else:
            hidden = torch.cat([known_final(row) for row in batch.rows])
        return take_logits(batch, starts, self._model.logits(hidden))

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch) -> list[SampledToken | None]:
        """Consume one token per row, commit the tails that became full, move the leases."""
        run_copies(self._pools, batch.copies)
        grid = self._grid
        plan, kv_plan = batch.plan(grid), batch.kv_plan(self._page_tokens)
        token_ids = [row.token_id for row in batch.rows]
        decoded = None if self.graphs is None else self.graphs.decode(token_ids, plan, kv_plan)
        if decoded is None:
            ids = self._tokens(token_ids)
            logits = self._model.decode(ids, plan, kv_plan, self.caches)
        else:
            logits = decoded.logits
        due = batch.commit_plan(grid)
        if due is not None:
            self._commit(due)
        batch.advance(grid)
        likeliest = None if decoded is None else decoded.likeliest()
        return sample(logits, [row.sample for row in batch.rows], likeliest)

    def _commit(self, plan: CommitPlan) -> None:
        if self.graphs is None:
            self._model.commit(plan, self.caches)
        else:
            self.graphs.commit(plan)

    def _tokens(self, ids: list[int]) -> torch.Tensor:
        # numpy walks a list two to four times as fast as torch.
        return device_array(np.array(ids, dtype=np.int64), self._device)
