"""Where a model's sequences live: what its layers read and write, handed in with every call."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry_kernels.kv_layer import KvLayer
from stateferry_kernels.layer_state import DraftRows, LayerState


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """One entry per Mamba-2 layer and one per attention layer, each in layer order. A layer that
    has both kinds of mixer owns one of each; a model without a kind has none of it."""

    states: tuple[LayerState, ...]
    kv: tuple[KvLayer, ...]
    # Beside the states, where drafts are verified.
    drafts: tuple[DraftRows, ...] = ()
