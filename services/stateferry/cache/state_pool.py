"""The memory of all sequences' recurrent state, laid out slot by slot.

A slot holds all layers of one state next to each other, so that a hand-off finds a layer's state in
one piece and a whole state in one block. Kernels see one layer of every slot: a strided view.
"""

from __future__ import annotations

import torch

from stateferry.cache.lease import SequenceLease
from stateferry.cache.state_view import StateView, whole
from stateferry.core.errors import ConfigError
from stateferry_kernels.layer_state import ZERO_SLOT, DraftRows, LayerState, StateGeometry

_Part = tuple[tuple[int, ...], torch.dtype]


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
        self._tensors = {
            kind: torch.empty((count, *shape), dtype=part_dtype, device=device)
            for count, parts in (
                (num_slots, slot_parts(geometry, dtype)),
                (num_pages, tail_parts(geometry, grid, dtype)),
            )
            for kind, (shape, part_dtype) in parts.items()
        }
        for kind in _STATE_KINDS:
            self._tensors[kind][ZERO_SLOT].zero_()
        self.layers = tuple(
            LayerState(**{kind: tensor[:, layer] for kind, tensor in self._tensors.items()})
            for layer in range(geometry.num_layers)
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
                    whole(kind, layer, self._tensors[kind][lease.state_slot, layer])
                    for kind in _STATE_KINDS
                ]
            if rows:
                views += [
                    whole(kind, layer, self._tensors[kind][lease.tail_page, layer, :rows])
                    for kind in _TAIL_KINDS
                ]
        return views

    def copy_tail(self, source: int, target: int, rows: int) -> None:
        """Copy rows [0, rows) of a tail page, all layers, to another. Mutates the target."""
        for kind in _TAIL_KINDS:
            self._tensors[kind][target, :, :rows] = self._tensors[kind][source, :, :rows]

    def slot_tensors(self, slot: int) -> list[torch.Tensor]:
        """All layers of one state, in place: what to copy to keep it elsewhere."""
        return [self._tensors[kind][slot] for kind in _STATE_KINDS]

    def tail_tensors(self, page: int, rows: int) -> list[torch.Tensor]:
        """Rows [0, rows) of a tail page, all layers, in place."""
        return [self._tensors[kind][page, :, :rows] for kind in _TAIL_KINDS]

    def draft_rows(self, num_pages: int, most_rows: int) -> tuple[DraftRows, ...]:
        """New memory for the drafts of ``num_pages`` sequences of at most ``most_rows`` tokens
        each, by layer."""
        device = self._tensors["ssm_state"].device
        tensors = {
            kind.removeprefix("tail_"): torch.empty((num_pages, *shape), dtype=dtype, device=device)
            for kind, (shape, dtype) in tail_parts(self.geometry, most_rows, self.dtype).items()
        }
        return tuple(
            DraftRows(**{kind: tensor[:, layer] for kind, tensor in tensors.items()})
            for layer in range(self.geometry.num_layers)
        )

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def max_sequence_bytes(self) -> int:
        """Most bytes that ``sequence_views`` of one sequence can have."""
        return sum(tensor[0].nbytes for tensor in self._tensors.values())

    def poison(self) -> None:
        """Overwrite every free or used byte but the zero slot with NaN. For tests."""
        for kind, tensor in self._tensors.items():
            tensor[1 if kind in _STATE_KINDS else 0 :].fill_(float("nan"))


def slot_parts(geometry: StateGeometry, dtype: torch.dtype) -> dict[str, _Part]:
    """What one state slot holds: (shape, dtype) by kind. ``dtype`` is that of activations."""
    g, layers = geometry, geometry.num_layers
    return {
        "ssm_state": ((layers, g.nheads, g.headdim, g.dstate), torch.float32),
        "conv_state": ((layers, g.conv_dim, g.d_conv - 1), dtype),
    }


def tail_parts(geometry: StateGeometry, grid: int, dtype: torch.dtype) -> dict[str, _Part]:
    """What one tail page holds: (shape, dtype) by kind."""
    g, layers = geometry, geometry.num_layers
    return {
        "tail_xBC": ((layers, grid, g.conv_dim), dtype),
        "tail_x": ((layers, grid, g.nheads, g.headdim), dtype),
        "tail_B": ((layers, grid, g.ngroups, g.dstate), dtype),
        "tail_dt": ((layers, grid, g.nheads), torch.float32),
    }


_STATE_KINDS = ("ssm_state", "conv_state")
_TAIL_KINDS = ("tail_xBC", "tail_x", "tail_B", "tail_dt")
