"""The rows of a decode plan that are not padding: index tensors that its operations share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.plans import DecodePlan


@dataclass(frozen=True, slots=True)
class LiveRows:
    """Index tensors (count,) int64. ``index`` is None when no row is padding."""

    count: int
    index: torch.Tensor | None  # row in the batch
    slots: torch.Tensor
    pages: torch.Tensor
    rows: torch.Tensor  # row in the tail

    def of(self, batch: torch.Tensor) -> torch.Tensor:
        """The live rows of batch (num_seqs, ..)."""
        return batch if self.index is None else batch[self.index]

    def put(self, values: torch.Tensor, batch: torch.Tensor) -> None:
        """Write values (count, ..) to the live rows of batch (num_seqs, ..)."""
        if self.index is None:
            batch.copy_(values)
        else:
            batch[self.index] = values


def live_rows(plan: DecodePlan, device: torch.device) -> LiveRows:
    """The plan's live rows, built once and kept in ``plan.cache``."""
    key = f"live_rows:{device}"
    if key not in plan.cache:
        live = [i for i, slot in enumerate(plan.state_slots) if slot != PAD_SLOT]
        columns = [(plan.state_slots[i], plan.tail_pages[i], plan.tail_rows[i]) for i in live]
        table = torch.tensor(columns, dtype=torch.int64, device=device).view(-1, 3)
        slots, pages, rows = table.T.contiguous().unbind()
        padded = len(live) < len(plan.state_slots)
        index = torch.tensor(live, dtype=torch.int64, device=device) if padded else None
        plan.cache[key] = LiveRows(len(live), index, slots, pages, rows)
    cached: LiveRows = plan.cache[key]
    return cached
