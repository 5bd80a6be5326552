"""What an engine may ask of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from stateferry.models.caches import LayerCaches
from stateferry.models.tree_rows import TreeRows
from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.kv_layer import KvGeometry, KvPlan
from stateferry_kernels.layer_state import StateGeometry
from stateferry_kernels.plans import CommitPlan, DecodePlan, ExtendPlan


class Model(Protocol):
    """Weights and arithmetic. Sequences live in the ``caches`` that each call is given.

    The two plans of a call describe the same rows in the same order: one says where the recurrent
    states are, the other where the keys and values are.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype, which is also that of conv_state, tails, keys and values."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def chunk_size(self) -> int:
        """The SSD chunk the model was trained with: a grid to start from, not a condition."""
        ...

    @property
    def state_geometry(self) -> StateGeometry:
        """Sizes of the Mamba-2 layers' states."""
        ...

    @property
    def kv_geometry(self) -> KvGeometry:
        """Sizes of the attention layers' keys and values; ``num_layers`` 0 when there are none."""
        ...

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
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (num_rows, d_model), from ``extend`` -> (num_rows, vocab_size) fp32. A row's
        logits do not depend on the others where the kernels' numerics say so."""
        ...

    def decode(
        self, token_ids: torch.Tensor, plan: DecodePlan, kv_plan: KvPlan, caches: LayerCaches
    ) -> torch.Tensor:
        """Consume one token per sequence: token_ids (num_seqs,) int64.

        Returns logits (num_seqs, vocab_size) fp32. Appends to tails and pages; commits nothing.
        """
        ...

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
        ...

    def accept(self, plan: AcceptPlan, caches: LayerCaches) -> None:
        """Append accepted rows to their tails, on every Mamba-2 layer, and commit what is full."""
        ...

    def commit(self, plan: CommitPlan, caches: LayerCaches) -> None:
        """Fold full tails into fresh slots, on every Mamba-2 layer."""
        ...
