"""What all architectures have in common: embedding, a stack of residual blocks, norm, head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stateferry.models.caches import LayerCaches
from stateferry.models.layers.block import Block
from stateferry.models.layers.mixer import MixerCore
from stateferry.models.recorded import RecordedSteps
from stateferry.models.step import Step
from stateferry.models.tree_rows import TreeRows
from stateferry_kernels.device_tables import device_array
from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.kv_layer import KvGeometry, KvPlan
from stateferry_kernels.layer_state import StateGeometry
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model (models/model.py). Sequences live in the ``caches`` of each call."""

    config: Any  # the architecture's own
    kernels: Kernels
    vocab_size: int
    dtype: torch.dtype  # of activations
    chunk_size: int
    state_geometry: StateGeometry
    kv_geometry: KvGeometry
    embedding: torch.Tensor  # (vocab_size, d_model)
    embedding_scale: float
    residual_dtype: torch.dtype
    blocks: tuple[Block, ...]
    mixers: tuple[MixerCore, ...]  # those of the blocks, in order
    final_norm: torch.Tensor  # (d_model,), in the dtype that norms are rounded to first
    norm_eps: float
    head: torch.Tensor  # (vocab_size, d_model)
    logit_scale: float
    recorded: RecordedSteps = field(
        init=False, default_factory=RecordedSteps, compare=False, repr=False
    )

    def extend(
        self,
        token_ids: torch.Tensor,
        plan: ExtendPlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
        last_rows: Sequence[int],
    ) -> torch.Tensor:
        """Consume a packed batch: token_ids (total_tokens,) int64.

        Returns what the head reads of the rows asked for: (len(last_rows), d_model). Mutates
        ``caches`` as the plans say.
        """
        step = Step.extend(self.kernels, token_ids, plan, kv_plan, caches)
        last, residual = self._stack(self._embed(token_ids), step)
        if not last_rows:
            return last[:0]
        rows = device_array(np.array(last_rows, dtype=np.int64), token_ids.device)
        return self._hidden(last[rows], residual[rows])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (num_rows, d_model), from ``extend`` -> (num_rows, vocab_size) fp32."""
        if not len(hidden):
            return torch.empty((0, self.vocab_size), device=hidden.device)
        logits = self.kernels.linear(hidden, self.head, None).float()
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale

    def decode(
        self, token_ids: torch.Tensor, plan: DecodePlan, kv_plan: KvPlan, caches: LayerCaches
    ) -> torch.Tensor:
        """Consume one token per sequence: token_ids (num_seqs,) int64.

        Returns logits (num_seqs, vocab_size) fp32. Appends to tails and pages; commits nothing.
        """
        embedded = self._embed(token_ids)
        stacked = self.recorded.run(self._stack, self.kernels, embedded, plan, kv_plan, caches)
        return self.logits(self._hidden(*stacked))

    def verify(
        self,
        token_ids: torch.Tensor,
        plan: VerifyPlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
        tree_rows: TreeRows | None = None,
    ) -> torch.Tensor:
        """Evaluate drafts: token_ids (plan.num_rows,) int64, each sequence's last token and what is
        guessed to follow it. A model with attention takes ``kv_plan`` where all are chains, else
        ``tree_rows``.

        Returns logits (num_rows, vocab_size) fp32. Writes draft rows, and keys and values behind
        the sequences' ends; nothing that counts before ``accept``.
        """
        embedded = self._embed(token_ids)
        if tree_rows is None:
            stacked = self.recorded.run(self._stack, self.kernels, embedded, plan, kv_plan, caches)
        else:
            step = Step.verify(self.kernels, embedded, plan, kv_plan, caches, tree_rows)
            stacked = self._stack(embedded, step)
        return self.logits(self._hidden(*stacked))

    def accept(self, plan: AcceptPlan, caches: LayerCaches) -> None:
        """Append accepted rows to their tails, on every Mamba-2 layer, and commit what is full."""
        for mixer, state, drafts in zip(self.mixers, caches.states, caches.drafts, strict=True):
            self.kernels.accept(params=mixer.ssm, plan=plan, state=state, drafts=drafts)

    def commit(self, plan: CommitPlan, caches: LayerCaches) -> None:
        """Fold full tails into fresh slots, on every Mamba-2 layer."""
        for mixer, state in zip(self.mixers, caches.states, strict=True):
            self.kernels.commit(params=mixer.ssm, plan=plan, state=state)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(num_rows, d_model): what the residual begins as."""
        residual = self.embedding[token_ids].to(self.residual_dtype)
        return residual if self.embedding_scale == 1.0 else residual * self.embedding_scale

    def _stack(self, residual: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """The last block's output, and the residual that it is yet to be added to."""
        add_rms_norm, eps, dtype = self.kernels.add_rms_norm, self.norm_eps, self.dtype
        cast = self.kernels.cast
        first, *rest = self.blocks
        normed = self.kernels.rms_norm(residual, first.norm, eps)
        output = first.layer(normed if normed.dtype is dtype else cast(normed, dtype), step)
        for block in rest:
            normed, residual = add_rms_norm(output, residual, block.norm, eps)
            if normed.dtype is not dtype:
                normed = cast(normed, dtype)
            output = block.layer(normed, step)
        return output, residual

    def _hidden(self, output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        normed, _ = self.kernels.add_rms_norm(output, residual, self.final_norm, self.norm_eps)
        return self.kernels.cast(normed, self.dtype)
