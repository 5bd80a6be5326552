"""What one Mamba-2 layer keeps for its sequences: views into pools that somebody else owns.

A sequence that has consumed ``position`` tokens is, on each layer::

    g = position // grid * grid                the last grid point
    state slot   ssm_state and conv_state, both as of exactly g tokens
    tail page    rows [0, position - g): the inputs of the tokens since g

A decode step appends one row to the tail page and writes no state. When the tail is full,
``commit`` folds it into a *fresh* slot: the old slot stays as a finished snapshot. Nothing else
ever changes, so a state slot is immutable from the moment it was written.

Slot ``ZERO_SLOT`` holds the state of every sequence at position 0: all zeros, shared, never
written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

ZERO_SLOT = 0
PAD_SLOT = -1

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16)
# What a state slot may hold. A state is rounded to it at every grid point, stored there or not, so
# that a token's bits do not depend on which boundaries somebody asked for.
STATE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class StateGeometry:
    """Sizes of a model's recurrent state; what a pool has to know to hold it."""

    num_layers: int
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    d_conv: int
    conv_dim: int


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer's views. The first stride of each is arbitrary; all other dimensions are
    contiguous.

    Slots and pages are recycled without clearing: no operation may let a byte that was not written
    for this sequence reach a result (tests poison them with NaN).
    """

    ssm_state: torch.Tensor  # (num_slots, nheads, headdim, dstate) fp32 or bf16
    conv_state: torch.Tensor  # (num_slots, conv_dim, d_conv - 1) activation dtype, raw columns
    tail_xBC: torch.Tensor  # (num_pages, grid, conv_dim) activation dtype, raw: before the conv
    tail_x: torch.Tensor  # (num_pages, grid, nheads, headdim) activation dtype, after conv and SiLU
    tail_B: torch.Tensor  # (num_pages, grid, ngroups, dstate) activation dtype, after conv and SiLU
    tail_dt: torch.Tensor  # (num_pages, grid, nheads) fp32, after bias, softplus and clamp
    # What a backend derives from the views (that they were checked, their addresses) and keeps.
    cache: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    @property
    def grid(self) -> int:
        return self.tail_dt.shape[1]


@dataclass(frozen=True, slots=True)
class DraftRows:
    """One layer's inputs of draft tokens, beside the tails: one page per speculating sequence.

    ``verify`` writes them, ``accept`` moves those of the accepted path into the tail; what was
    rejected is simply overwritten by the next draft. Same strides and dtypes as the tails.
    """

    xBC: torch.Tensor  # (num_draft_pages, max_draft, conv_dim) activation dtype, raw
    x: torch.Tensor  # (num_draft_pages, max_draft, nheads, headdim) activation dtype
    B: torch.Tensor  # (num_draft_pages, max_draft, ngroups, dstate) activation dtype
    dt: torch.Tensor  # (num_draft_pages, max_draft, nheads) fp32, after bias, softplus and clamp
    cache: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SsmLayerParams:
    """One layer's parameters of the recurrence. ``A`` is negative (already ``-exp(A_log)``)."""

    A: torch.Tensor  # (nheads,) fp32
    D: torch.Tensor | None  # (nheads,) fp32
    dt_bias: torch.Tensor | None  # (nheads,) fp32
    dt_softplus: bool
    dt_limit: tuple[float, float]  # (min, max) after softplus
    cache: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ConvParams:
    """One layer's depthwise causal convolution, followed by SiLU."""

    weight: torch.Tensor  # (conv_dim, d_conv)
    bias: torch.Tensor | None  # (conv_dim,)
    cache: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)
