"""The memory of all sequences' recurrent state, laid out slot by slot.

A slot holds all layers of one state next to each other, so that a hand-off finds a layer's state in
one piece and a whole state in one block. Kernels see one layer of every slot: a strided view.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

import torch

from stateferry.cache.lease import SequenceLease
from stateferry.core.errors import ConfigError
from stateferry_kernels.layer_state import ZERO_SLOT, LayerState, StateGeometry

_LAYOUT_VERSION = 1


@dataclass(frozen=True, slots=True)
class StateView:
    """A contiguous piece of one sequence's state, in place in the pool. ``kind`` is the name of the
    LayerState field it belongs to."""

    kind: str
    layer: int
    tensor: torch.Tensor


class StatePool:
    """Tensors for ``num_slots`` states and ``num_pages`` tails. Slot 0 stays zero for ever."""

    def __init__(
        self,
        geometry: StateGeometry,
        *,
        grid: int,
        dtype: torch.dtype,
        num_slots: int,
        num_pages: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if grid < geometry.d_conv - 1:
            raise ConfigError(
                "model.grid_tokens",
                f"{grid} is shorter than the convolution's window of {geometry.d_conv - 1}",
            )
        self.geometry = geometry
        self.grid = grid
        self.dtype = dtype
        g, layers = geometry, geometry.num_layers

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._tensors = {
            "ssm_state": empty(
                num_slots, layers, g.nheads, g.headdim, g.dstate, dtype=torch.float32
            ),
            "conv_state": empty(num_slots, layers, g.conv_dim, g.d_conv - 1),
            "tail_xBC": empty(num_pages, layers, grid, g.conv_dim),
            "tail_x": empty(num_pages, layers, grid, g.nheads, g.headdim),
            "tail_B": empty(num_pages, layers, grid, g.ngroups, g.dstate),
            "tail_dt": empty(num_pages, layers, grid, g.nheads, dtype=torch.float32),
        }
        for kind in _STATE_KINDS:
            self._tensors[kind][ZERO_SLOT].zero_()
        self.layers = tuple(
            LayerState(**{kind: tensor[:, layer] for kind, tensor in self._tensors.items()})
            for layer in range(layers)
        )

    def sequence_views(self, lease: SequenceLease) -> list[StateView]:
        """Everything another worker needs to continue the sequence, in a fixed order.

        The state at ZERO_SLOT is known to everybody and is left out; so are unwritten tail rows.
        """
        rows = lease.position % self.grid
        views = []
        for layer in range(self.geometry.num_layers):
            if lease.state_slot != ZERO_SLOT:
                views += [
                    StateView(kind, layer, self._tensors[kind][lease.state_slot, layer])
                    for kind in _STATE_KINDS
                ]
            if rows:
                views += [
                    StateView(kind, layer, self._tensors[kind][lease.tail_page, layer, :rows])
                    for kind in _TAIL_KINDS
                ]
        return views

    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def max_sequence_bytes(self) -> int:
        """Most bytes that ``sequence_views`` of one sequence can have."""
        return sum(tensor[0].nbytes for tensor in self._tensors.values())

    def poison(self) -> None:
        """Overwrite every free or used byte but the zero slot with NaN. For tests."""
        for kind, tensor in self._tensors.items():
            tensor[1 if kind in _STATE_KINDS else 0 :].fill_(float("nan"))


def layout_fingerprint(geometry: StateGeometry, grid: int, dtype: torch.dtype) -> str:
    """Digest of all that decides what the bytes of a hand-off mean."""
    text = f"{_LAYOUT_VERSION}:{astuple(geometry)}:{grid}:{dtype}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_STATE_KINDS = ("ssm_state", "conv_state")
_TAIL_KINDS = ("tail_xBC", "tail_x", "tail_B", "tail_dt")
