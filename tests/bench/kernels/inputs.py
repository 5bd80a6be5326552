"""Random layers and tokens, by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels.workload import Shape
from stateferry_kernels.elementwise import softplus
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState, SsmLayerParams

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass
class Source:
    """Draws numbers; the same seed gives the same ones."""

    shape: Shape
    seed: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *size: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.randn(size, generator=self._generator).to(dtype)

    def params(self) -> SsmLayerParams:
        nheads = self.shape.nheads
        return SsmLayerParams(
            A=-torch.exp(self.normal(nheads)),
            D=self.normal(nheads),
            dt_bias=self.normal(nheads) - 2,
            dt_softplus=True,
            dt_limit=(0.0, math.inf),
        )

    def conv(self, dtype: torch.dtype) -> ConvParams:
        s = self.shape
        weight = self.normal(s.conv_dim, s.d_conv, dtype=dtype)
        return ConvParams(weight, self.normal(s.conv_dim, dtype=dtype))

    def tokens(self, *lead: int, dtype: torch.dtype = FP32) -> dict[str, torch.Tensor]:
        """x, dt (raw), B and C of (.., nheads, headdim), (.., nheads), (.., ngroups, dstate)."""
        s = self.shape
        return {
            "x": self.normal(*lead, s.nheads, s.headdim, dtype=dtype),
            "dt": self.normal(*lead, s.nheads, dtype=dtype),
            "B": self.normal(*lead, s.ngroups, s.dstate, dtype=dtype),
            "C": self.normal(*lead, s.ngroups, s.dstate, dtype=dtype),
        }

    def layer(self, slots: int, pages: int, dtype: torch.dtype, state: torch.dtype) -> LayerState:
        """Pools with content in every slot and page, but for zeros in slot 0."""
        s = self.shape
        pool = torch.empty(slots, s.nheads, s.headdim, s.dstate, dtype=state)
        conv_state = torch.empty(slots, s.conv_dim, s.d_conv - 1, dtype=dtype)
        tails = {
            "xBC": torch.empty(pages, s.grid, s.conv_dim, dtype=dtype),
            "x": torch.empty(pages, s.grid, s.nheads, s.headdim, dtype=dtype),
            "B": torch.empty(pages, s.grid, s.ngroups, s.dstate, dtype=dtype),
        }
        for tensor in (pool, conv_state, *tails.values()):
            self._fill(tensor)
        pool[0] = 0
        conv_state[0] = 0
        dt = softplus(self.normal(pages, s.grid, s.nheads) - 2)
        return LayerState(pool, conv_state, tails["xBC"], tails["x"], tails["B"], dt)

    def drafts(self, pages: int, length: int, dtype: torch.dtype) -> DraftRows:
        s = self.shape

        def page(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(pages, length, *size, dtype=dtype)

        return DraftRows(
            xBC=page(s.conv_dim),
            x=page(s.nheads, s.headdim),
            B=page(s.ngroups, s.dstate),
            dt=page(s.nheads, dtype=FP32),
        )

    def _fill(self, tensor: torch.Tensor) -> None:
        """One slot's worth of numbers, repeated: drawing a gigabyte takes longer than the rest."""
        if tensor.shape[0]:
            tensor[:] = self.normal(*tensor.shape[1:], dtype=tensor.dtype)


def clone_layer(layer: LayerState) -> LayerState:
    names = ("ssm_state", "conv_state", "tail_xBC", "tail_x", "tail_B", "tail_dt")
    copies: dict[str, Any] = {name: getattr(layer, name).clone() for name in names}
    return LayerState(**copies)
