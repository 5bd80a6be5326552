"""What all architectures have in common: embedding, a stack of residual blocks, norm, head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stateferry.models.caches import LayerCaches
from stateferry.models.layers.block import Block
from stateferry.models.layers.mixer import MixerCore
from stateferry.models.step import Step
from stateferry_kernels.kv_layer import KvGeometry, KvPlan
from stateferry_kernels.layer_state import StateGeometry
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model (models/model.py). Stateless: sequences live in the ``caches`` of each call."""

    config: Any  # the architecture's own
    kernels: Kernels
    vocab_size: int
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

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype."""
        return self.embedding.dtype

    def extend(
        self,
        token_ids: torch.Tensor,
        plan: ExtendPlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
        last_rows: Sequence[int],
    ) -> torch.Tensor:
        """Consume a packed batch: token_ids (total_tokens,) int64.

        Returns logits (len(last_rows), vocab_size) fp32 of the rows asked for. Mutates ``caches``
        as the plans say.
        """
        step = Step.extend(self.kernels, token_ids, plan, kv_plan, caches)
        last, residual = self._stack(token_ids, step)
        if not last_rows:
            return torch.empty((0, self.vocab_size), device=token_ids.device)
        rows = torch.tensor(last_rows, device=token_ids.device)
        return self._logits(last[rows], residual[rows])

    def decode(
        self, token_ids: torch.Tensor, plan: DecodePlan, kv_plan: KvPlan, caches: LayerCaches
    ) -> torch.Tensor:
        """Consume one token per sequence: token_ids (num_seqs,) int64.

        Returns logits (num_seqs, vocab_size) fp32. Appends to tails and pages; commits nothing.
        """
        step = Step.decode(self.kernels, token_ids, plan, kv_plan, caches)
        return self._logits(*self._stack(token_ids, step))

    def commit(self, plan: CommitPlan, caches: LayerCaches) -> None:
        """Fold full tails into fresh slots, on every Mamba-2 layer."""
        for mixer, state in zip(self.mixers, caches.states, strict=True):
            self.kernels.commit(params=mixer.ssm, plan=plan, state=state)

    def _stack(self, token_ids: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """The last block's output, and the residual that it is yet to be added to."""
        add_rms_norm, eps, dtype = self.kernels.add_rms_norm, self.norm_eps, self.dtype
        residual = self.embedding[token_ids].to(self.residual_dtype)
        if self.embedding_scale != 1.0:
            residual = residual * self.embedding_scale
        first, *rest = self.blocks
        output = first.layer(self.kernels.rms_norm(residual, first.norm, eps).to(dtype), step)
        for block in rest:
            normed, residual = add_rms_norm(output, residual, block.norm, eps)
            if normed.dtype is not dtype:
                normed = normed.to(dtype)
            output = block.layer(normed, step)
        return output, residual

    def _logits(self, output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        normed, _ = self.kernels.add_rms_norm(output, residual, self.final_norm, self.norm_eps)
        logits = self.kernels.linear(normed.to(self.dtype), self.head, None).float()
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale
