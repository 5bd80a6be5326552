"""The memory of all sequences' keys and values, in pages.

Page-major: a page holds all attention layers of its tokens next to each other, and within a layer
its keys and values, so that a hand-off finds a layer's share of a page in one piece. Kernels see
one layer of every page: strided views.
"""

from __future__ import annotations

import torch

from stateferry.cache.lease import SequenceLease
from stateferry.cache.state_view import StateView
from stateferry_kernels.kv_layer import KvGeometry, KvLayer


class KvPool:
    """One tensor of ``num_pages`` pages of ``page_tokens`` tokens; a model without attention
    needs no page and gets no memory."""

    def __init__(
        self,
        geometry: KvGeometry,
        *,
        page_tokens: int,
        dtype: torch.dtype,
        num_pages: int,
        num_draft_pages: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """num_draft_pages: more of them, which no sequence leases."""
        self.geometry = geometry
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        self.draft_pages = range(num_pages, num_pages + num_draft_pages)
        # (all pages, layers, keys or values, kv_heads, page_tokens, head_dim)
        shape = (num_pages + num_draft_pages, *page_shape(geometry, page_tokens))
        self._tensor = torch.empty(shape, dtype=dtype, device=device)
        self.layers = tuple(
            KvLayer(keys=self._tensor[:, layer, 0], values=self._tensor[:, layer, 1])
            for layer in range(geometry.num_layers)
        )

    def pages_for(self, num_tokens: int) -> int:
        """Pages that a sequence of ``num_tokens`` takes."""
        return pages_for(self.geometry, self.page_tokens, num_tokens)

    def page_views(self, lease: SequenceLease, first: int, end: int) -> list[StateView]:
        """The sequence's full pages [first, end), layer by layer; none when there are none."""
        views = []
        for layer in range(self.geometry.num_layers if first < end else 0):
            pieces = tuple(self._tensor[page, layer] for page in lease.kv_pages[first:end])
            shape = (end - first, *pieces[0].shape)
            views.append(StateView("kv_pages", layer, shape, pieces, first))
        return views

    def sequence_views(self, lease: SequenceLease, first_page: int = 0) -> list[StateView]:
        """Keys and values of positions [0, position) but those of the pages before ``first_page``,
        layer by layer: the full pages one after the other, then the written places of the last."""
        num_full, rows = divmod(lease.position, self.page_tokens)
        views = []
        for layer in range(self.geometry.num_layers):
            pages = self._tensor[:, layer]
            if first_page < num_full:
                pieces = tuple(pages[page] for page in lease.kv_pages[first_page:num_full])
                shape = (num_full - first_page, *pieces[0].shape)
                views.append(StateView("kv_pages", layer, shape, pieces, first_page))
            if rows:
                # Unwritten places may hold another request's tokens: they stay here.
                written = pages[lease.kv_pages[num_full], :, :, :rows]
                pieces = tuple(head for both in written.unbind() for head in both.unbind())
                views.append(StateView("kv_rows", layer, tuple(written.shape), pieces))
        return views

    def copy_page(self, source: int, target: int, rows: int) -> None:
        """Copy the first ``rows`` places of a page, all layers, to another. Mutates the target."""
        self._tensor[target, :, :, :, :rows] = self._tensor[source, :, :, :, :rows]

    def page_tensor(self, page: int, rows: int) -> torch.Tensor:
        """The first ``rows`` places of a page, all layers, in place."""
        return self._tensor[page, :, :, :, :rows]

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes that ``sequence_views`` has at position ``num_tokens``."""
        g = self.geometry
        row = g.num_layers * 2 * g.kv_heads * g.head_dim
        return num_tokens * row * self._tensor.element_size()

    @property
    def size_bytes(self) -> int:
        return self._tensor.nbytes

    def poison(self) -> None:
        """Overwrite every page with NaN. For tests."""
        self._tensor.fill_(float("nan"))


def page_shape(geometry: KvGeometry, page_tokens: int) -> tuple[int, ...]:
    """One page: (layers, 2, kv_heads, page_tokens, head_dim)."""
    return (geometry.num_layers, 2, geometry.kv_heads, page_tokens, geometry.head_dim)


def pages_for(geometry: KvGeometry, page_tokens: int, num_tokens: int) -> int:
    """Pages that a sequence of ``num_tokens`` takes; none when the model has no attention."""
    return -(-num_tokens // page_tokens) if geometry.num_layers else 0
