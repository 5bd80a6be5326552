"""What one attention layer keeps for its sequences: pages of keys and values, and who has which.

A sequence that has consumed ``position`` tokens has its keys and values in the first ``position``
places of its pages, in order. Pages are recycled without clearing: nothing may read a place that
was not written for this sequence (tests poison them with NaN).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stateferry_kernels.device_tables import device_array


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Sizes of a model's keys and values; ``num_layers`` counts attention layers, maybe none."""

    num_layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One attention layer's views. The first stride is arbitrary, the rest contiguous: a page holds
    each head's keys in one piece."""

    # After rotary.
    keys: torch.Tensor  # (num_pages, kv_heads, page_tokens, head_dim) activation dtype
    values: torch.Tensor  # (num_pages, kv_heads, page_tokens, head_dim) activation dtype
    cache: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    @property
    def page_tokens(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class KvSequence:
    """One sequence's share of a batch: ``length`` tokens from absolute position ``start``, all of
    its places [0, start + length) lying in ``pages``."""

    start: int
    length: int
    pages: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class KvPlan:
    """Rows of a packed batch, in the order of ``sequences``: an extend's, or one per sequence in a
    decode step. A model without attention has sequences without pages."""

    page_tokens: int
    sequences: tuple[KvSequence, ...]
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def total_tokens(self) -> int:
        return sum(sequence.length for sequence in self.sequences)

    @property
    def positions(self) -> list[int]:
        """(total_tokens,) absolute position of each row."""
        return [p for s in self.sequences for p in range(s.start, s.end)]


def row_positions(plan: KvPlan, device: torch.device) -> torch.Tensor:
    """(total_tokens,) int64, absolute position of each row; built once, kept in ``plan.cache``."""
    key = f"positions:{device}"
    if key not in plan.cache:
        plan.cache[key] = device_array(np.array(plan.positions, dtype=np.int64), device)
    positions: torch.Tensor = plan.cache[key]
    return positions
