"""One forward pass: which rows there are, where their sequences live, and what the layers share.

An extend, a decode step and a verification differ in two operations only, the convolution and the
state space model. Layers are written once and ask the step for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from stateferry.models.caches import LayerCaches
from stateferry.models.sizes import AttentionSizes, MixerSizes
from stateferry.models.tree_rows import TreeRows
from stateferry_kernels.device_tables import device_array
from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.kv_layer import KvPlan, row_positions
from stateferry_kernels.layer_state import ConvParams, DraftRows, LayerState, SsmLayerParams
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import DecodePlan, ExtendPlan


@dataclass(frozen=True, slots=True)
class MixerRows:
    """What a mixer computes in between. Layers run one after the other, so one serves them all."""

    activated: torch.Tensor  # (num_rows, conv_dim): x | B | C after the convolution
    x: torch.Tensor  # (num_rows, nheads, headdim), a view of it
    B: torch.Tensor  # (num_rows, ngroups, dstate), a view of it
    C: torch.Tensor  # (num_rows, ngroups, dstate), a view of it
    y: torch.Tensor  # (num_rows, d_inner)
    y_heads: torch.Tensor  # (num_rows, nheads, headdim), a view of y


@dataclass(frozen=True, slots=True)
class Attended:
    """What attention computes, likewise."""

    rows: torch.Tensor  # (num_rows, heads * head_dim)
    heads: torch.Tensor  # (num_rows, heads, head_dim), a view of it


@dataclass(frozen=True, slots=True)
class Positions:
    rows: torch.Tensor  # (num_rows,) int64, absolute
    end: int  # above all of them


@dataclass(frozen=True, slots=True)
class _Tree:
    """TreeRows on the device."""

    kv_plan: KvPlan
    rows: torch.Tensor
    first: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def on(cls, tree: TreeRows, device: torch.device) -> _Tree:
        columns = (tree.rows, tree.first, tree.positions)
        rows, first, positions = (
            device_array(np.array(column, dtype=np.int64), device) for column in columns
        )
        return cls(tree.kv_plan, rows, first, positions)


class Step:
    """One pass; ``conv`` and ``ssm`` are bound to its plan."""

    def __init__(
        self,
        kernels: Kernels,
        token_ids: torch.Tensor,
        kv_plan: KvPlan,
        caches: LayerCaches,
        conv: Callable[..., None],
        ssm: Callable[..., None],
    ) -> None:
        self.kernels = kernels
        self.kv_plan = kv_plan
        self.caches = caches
        self.num_rows = token_ids.shape[0]
        self._device = token_ids.device
        self._conv = conv
        self._ssm = ssm
        self._drafts: tuple[DraftRows, ...] = ()
        self._tree: _Tree | None = None
        self._mixer_rows: MixerRows | None = None
        self._attended: Attended | None = None
        self._positions: Positions | None = None

    @classmethod
    def extend(
        cls,
        kernels: Kernels,
        token_ids: torch.Tensor,
        plan: ExtendPlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
    ) -> Step:
        """A packed batch of runs of tokens."""
        conv = partial(kernels.causal_conv1d_extend, plan=plan)
        ssm = partial(kernels.chunk_scan, plan=plan)
        return cls(kernels, token_ids, kv_plan, caches, conv, ssm)

    @classmethod
    def decode(
        cls,
        kernels: Kernels,
        token_ids: torch.Tensor,
        plan: DecodePlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
    ) -> Step:
        """One token per sequence."""
        conv = partial(kernels.causal_conv1d_row, plan=plan)
        ssm = partial(kernels.decode_row, plan=plan)
        return cls(kernels, token_ids, kv_plan, caches, conv, ssm)

    @classmethod
    def verify(
        cls,
        kernels: Kernels,
        token_ids: torch.Tensor,
        plan: VerifyPlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
        tree_rows: TreeRows | None = None,
    ) -> Step:
        """A packed batch of drafts; ``tree_rows`` where some are no chains and there is
        attention."""
        conv = partial(kernels.causal_conv1d_verify, plan=plan)
        ssm = partial(kernels.verify, plan=plan)
        step = cls(kernels, token_ids, kv_plan, caches, conv, ssm)
        step._drafts = caches.drafts
        if tree_rows is not None:
            step._tree = _Tree.on(tree_rows, token_ids.device)
        return step

    def conv(self, xBC: torch.Tensor, conv: ConvParams, mixer: int, rows: MixerRows) -> None:
        """Convolve and activate xBC (num_rows, conv_dim) of mixer number ``mixer``."""
        self._conv(xBC, conv=conv, out=rows.activated, **self._places(mixer))

    def ssm(
        self,
        rows: MixerRows,
        dt: torch.Tensor,
        params: SsmLayerParams,
        mixer: int,
        z: torch.Tensor | None,
    ) -> None:
        """x, dt, B, C -> y, gated by z (num_rows, nheads, headdim) if there is one."""
        places = self._places(mixer)
        self._ssm(rows.x, dt, rows.B, rows.C, params=params, out=rows.y_heads, z=z, **places)

    def _places(self, mixer: int) -> dict[str, LayerState | DraftRows]:
        """Where the mixer's sequences live."""
        places: dict[str, LayerState | DraftRows] = {"state": self.caches.states[mixer]}
        if self._drafts:
            places["drafts"] = self._drafts[mixer]
        return places

    @property
    def positions(self) -> Positions:
        """Where the rows are in their sequences."""
        if self._positions is None:
            if self._tree is None:
                rows, kv_plan = row_positions(self.kv_plan, self._device), self.kv_plan
            else:
                rows, kv_plan = self._tree.positions, self._tree.kv_plan
            self._positions = Positions(rows, max(s.end for s in kv_plan.sequences))
        return self._positions

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        layer: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attention of layer number ``layer`` among those that have it. Writes k and v into the
        sequences' pages."""
        attention, kv = self.kernels.attention, self.caches.kv[layer]
        if self._tree is None:
            attention(q, k, v, plan=self.kv_plan, kv=kv, scale=scale, out=out)
            return
        rows = self._tree.rows
        of_paths = torch.empty((len(rows), *out.shape[1:]), dtype=out.dtype, device=out.device)
        attention(
            q[rows], k[rows], v[rows], plan=self._tree.kv_plan, kv=kv, scale=scale, out=of_paths
        )
        torch.index_select(of_paths, 0, self._tree.first, out=out)

    def mixer_rows(self, sizes: MixerSizes, dtype: torch.dtype) -> MixerRows:
        """Buffers that the next mixer may overwrite."""
        if self._mixer_rows is None:
            rows = self.num_rows
            activated = torch.empty((rows, sizes.conv_dim), dtype=dtype, device=self._device)
            x, B, C = activated.split_with_sizes([sizes.d_inner, sizes.bc_dim, sizes.bc_dim], 1)
            y = torch.empty((rows, sizes.d_inner), dtype=dtype, device=self._device)
            self._mixer_rows = MixerRows(
                activated,
                x.view(rows, sizes.nheads, sizes.headdim),
                B.view(rows, sizes.ngroups, sizes.dstate),
                C.view(rows, sizes.ngroups, sizes.dstate),
                y,
                y.view(rows, sizes.nheads, sizes.headdim),
            )
        return self._mixer_rows

    def attended(self, sizes: AttentionSizes, dtype: torch.dtype) -> Attended:
        """A buffer that the next attention layer may overwrite."""
        if self._attended is None:
            rows = torch.empty((self.num_rows, sizes.q_dim), dtype=dtype, device=self._device)
            heads = rows.view(self.num_rows, sizes.heads, sizes.head_dim)
            self._attended = Attended(rows, heads)
        return self._attended
