"""Runs batches through the model, in two halves.

Planning reads and moves leases, on the thread that keeps the books; it computes nothing. Its result
is a launch, which touches the pools and no lease, on any other thread: in the order of planning,
one at a time. On a GPU the next one may be started while it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from stateferry.cache.page_copies import run_copies
from stateferry.cache.page_copy import PageCopy
from stateferry.cache.pools import SequencePools
from stateferry.core.errors import InvariantViolation
from stateferry.engine.arriving import Arriving
from stateferry.engine.draft_paths import PAGES_PER_PATH, DraftPaths, draft_paths
from stateferry.engine.extend_logits import (
    keep_finals,
    known_final,
    rows_with_logits,
    take_logits,
    wants_likeliest_alone,
)
from stateferry.engine.forward_batch import DecodeBatch, ExtendBatch
from stateferry.engine.freed_memory import keep_freed_memory
from stateferry.engine.launch import Launch, Over, Planned, Sampled, Started
from stateferry.engine.sampler import greedy_tokens, is_greedy, likeliest_rows, sample
from stateferry.engine.verify_batch import AcceptPlace, Run, VerifyBatch, accept_plan
from stateferry.engine.verify_walk import walk
from stateferry.models.caches import LayerCaches
from stateferry.models.model import Model
from stateferry_kernels.device_tables import device_array
from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.kv_layer import KvPlan
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan

if TYPE_CHECKING:
    from stateferry.engine.decode_graphs import DecodeGraphs


@dataclass(frozen=True, slots=True)
class Drafts:
    """Room for drafts: of so many sequences at a time, of so many rows each, a sequence's last
    token among them, and of trees with so many leaves."""

    sequences: int
    rows: int
    paths: int = 1

    @property
    def kv_pages(self) -> int:
        """That they take beside the sequences' own."""
        return self.sequences * (self.paths - 1) * PAGES_PER_PATH


@dataclass(frozen=True, slots=True, eq=False)
class _Ahead:
    """A pass on the device, all of whose rows take the likeliest token. ``batch`` of a decode step:
    others may consume its tokens."""

    likeliest: Arriving
    batch: DecodeBatch | None = None

    @property
    def is_over(self) -> bool:
        return self.likeliest.is_here

    def sampled(self) -> Sampled:
        tokens = greedy_tokens(self.likeliest.wait())
        return tokens if self.batch is None else _note(self.batch, tokens)


class ModelRunner:
    """One model over the pools of its sequences."""

    def __init__(
        self,
        model: Model,
        pools: SequencePools,
        device: torch.device | str = "cpu",
        *,
        graphs_up_to_tokens: int = 0,
        drafts: Drafts | None = None,
    ) -> None:
        """graphs_up_to_tokens: whether decode steps run as CUDA graphs, for sequences of at most so
        many tokens; on the Triton backend and a GPU alone. 0: they do not. drafts: room for those
        that ``verify`` takes; without, there is none."""
        self._model = model
        self._pools = pools
        self._grid = pools.grid
        self._page_tokens = pools.kv.page_tokens
        self._device = torch.device(device)
        self._due: deque[PageCopy] = deque()
        # The last decode step, while nobody need have seen its tokens.
        self._ahead: _Ahead | None = None
        keep_freed_memory()
        self.drafts = drafts
        self.caches = LayerCaches(
            states=pools.states.layers,
            kv=pools.kv.layers,
            drafts=() if drafts is None else pools.states.draft_rows(drafts.sequences, drafts.rows),
        )
        self.graphs: DecodeGraphs | None = None
        if graphs_up_to_tokens:
            # Imported late: Triton is not everywhere.
            from stateferry.engine.decode_graphs import DecodeGraphs

            self.graphs = DecodeGraphs(
                model, self.caches, page_tokens=self._page_tokens, longest=graphs_up_to_tokens
            )

    @property
    def pools(self) -> SequencePools:
        """Where its sequences live."""
        return self._pools

    def extend(self, batch: ExtendBatch) -> Launch:
        """Plan to consume the rows' tokens. Moves their leases; the launch sets the ``final`` of
        those that keep one."""
        starts = [row.lease.position for row in batch.rows]
        plan, kv_plan = batch.plan(self._grid), batch.kv_plan(self._page_tokens)
        batch.advance(self._grid)
        return Planned(partial(self._extend, batch, starts, plan, kv_plan))

    def decode(self, batch: DecodeBatch) -> Launch:
        """Plan to consume one token per row, to commit the tails that become full, and to fill in
        what is ``sampled``. Moves the leases."""
        plan, kv_plan = batch.plan(self._grid), batch.kv_plan(self._page_tokens)
        due = batch.commit_plan(self._grid)
        batch.advance(self._grid)
        return Planned(partial(self._decode, batch, plan, kv_plan, due))

    def verify(self, batch: VerifyBatch) -> Planned[list[Run]]:
        """Plan to consume of each row its last token and as much of its draft as is right. The
        leases stay where they are until ``batch.advance`` moves them past the launch's result:
        until then nothing else may be planned for these sequences. Raises InvariantViolation for
        more sequences or longer drafts than there is room for."""
        drafts = self.drafts
        if drafts is None or len(batch.rows) > drafts.sequences:
            raise InvariantViolation(f"{len(batch.rows)} drafts, there is room for {drafts}")
        if max(row.num_rows for row in batch.rows) > drafts.rows:
            raise InvariantViolation(f"a draft of more rows than there is room for: {drafts}")
        plan, kv_plan = batch.plan(self._grid), batch.kv_plan(self._page_tokens)
        paths = None
        if self.caches.kv:
            pages = self._pools.kv.draft_pages
            paths = draft_paths(batch, self._page_tokens, pages, drafts.paths)
        return Planned(partial(self._verify, batch, plan, kv_plan, paths, batch.places()))

    @torch.inference_mode()
    def copy(self, copies: Iterable[PageCopy]) -> None:
        """Make these copies, after those that an earlier call did not get to because it failed.
        Part of a launch: nothing may read or write the pools meanwhile."""
        self._due.extend(copies)
        while self._due:
            run_copies(self._pools, (self._due[0],))
            self._due.popleft()

    @torch.inference_mode()
    def _extend(
        self, batch: ExtendBatch, starts: Sequence[int], plan: ExtendPlan, kv_plan: KvPlan
    ) -> Started:
        if batch.computed:
            rows = rows_with_logits(batch, plan.cu_seqlens)
            token_ids = self._tokens([t for row in batch.computed for t in row.token_ids])
            hidden = self._model.extend(token_ids, plan, kv_plan, self.caches, rows)
            hidden = keep_finals(batch, hidden)
        else:
            hidden = torch.cat([known_final(row) for row in batch.rows])
        logits = self._model.logits(hidden)
        if self._device.type == "cuda" and wants_likeliest_alone(batch):
            return _Ahead(Arriving(likeliest_rows(logits)))
        return Over(take_logits(batch, starts, logits))

    @torch.inference_mode()
    def _decode(
        self, batch: DecodeBatch, plan: DecodePlan, kv_plan: KvPlan, due: CommitPlan | None
    ) -> Started:
        ahead, self._ahead = self._ahead, None
        decoded = None
        if self.graphs is not None:
            sources = batch.sources(ahead)
            ids = batch.token_ids(sources)
            decoded = self.graphs.decode(ids, sources, plan, kv_plan)
        if decoded is None:
            logits = self._model.decode(self._tokens(batch.token_ids()), plan, kv_plan, self.caches)
        else:
            logits = decoded.logits
        if due is not None:
            self._commit(due)
        specs = [row.sample for row in batch.rows]
        if decoded is not None and all(map(is_greedy, specs)):
            self._ahead = _Ahead(decoded.likeliest, batch)
            for number, row in enumerate(batch.rows):
                row.sampled.source, row.sampled.row = self._ahead, number
            return self._ahead
        likeliest = None if decoded is None else decoded.likeliest.wait()
        return Over(_note(batch, sample(logits, specs, likeliest)))

    @torch.inference_mode()
    def _verify(
        self,
        batch: VerifyBatch,
        plan: VerifyPlan,
        kv_plan: KvPlan,
        paths: DraftPaths | None,
        places: list[AcceptPlace],
    ) -> Over[list[Run]]:
        self._ahead = None
        token_ids = self._tokens(batch.token_ids())
        tree_rows = None
        if paths is not None:
            tree_rows = paths.tree_rows
            run_copies(self._pools, paths.before)
        logits = self._model.verify(token_ids, plan, kv_plan, self.caches, tree_rows)
        runs = walk(logits, batch)
        if paths is not None:
            run_copies(self._pools, paths.after(runs))
        accepted = accept_plan(places, runs, self._grid)
        if accepted is not None:
            self._model.accept(accepted, self.caches)
        return Over(runs)

    def _commit(self, plan: CommitPlan) -> None:
        if self.graphs is None:
            self._model.commit(plan, self.caches)
        else:
            self.graphs.commit(plan)

    def _tokens(self, ids: list[int]) -> torch.Tensor:
        # numpy walks a list two to four times as fast as torch.
        return device_array(np.array(ids, dtype=np.int64), self._device)


def _note(batch: DecodeBatch, tokens: Sampled) -> Sampled:
    """Tell those who consume the tokens."""
    for row, token in zip(batch.rows, tokens, strict=True):
        # Of a row without a token any id will do, and nobody needs to wait for a better one.
        row.sampled.come_out(0 if token is None else token.token_id)
    return tokens
