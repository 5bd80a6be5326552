"""Sequences that walk through a model by extends and decode steps, as an engine would lead them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stateferry.cache.kv_pool import KvPool
from stateferry.cache.state_pool import StatePool
from stateferry.models.caches import LayerCaches
from stateferry.models.model import Model
from stateferry_kernels.kv_layer import KvPlan, KvSequence
from stateferry_kernels.layer_state import ZERO_SLOT
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)

PAGE_TOKENS = 16


@dataclass(slots=True)
class _Place:
    """Where a sequence is, and the two slots that its states alternate between."""

    position: int
    slots: tuple[int, int]
    current: int
    pages: tuple[int, ...]

    def spare(self) -> int:
        return self.slots[self.current == self.slots[0]]


class ModelWalk:
    """``count`` sequences over one model, each of at most ``max_tokens``. Memory is full of NaN."""

    def __init__(
        self,
        model: Model,
        count: int,
        *,
        max_tokens: int = 512,
        grid: int | None = None,
        page_tokens: int = PAGE_TOKENS,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.grid = grid or model.chunk_size
        pages_each = -(-max_tokens // page_tokens)
        states = StatePool(
            model.state_geometry,
            grid=self.grid,
            dtype=model.dtype,
            num_slots=1 + 2 * count,
            num_pages=count,
        )
        kv = KvPool(
            model.kv_geometry,
            page_tokens=page_tokens,
            dtype=model.dtype,
            num_pages=count * pages_each,
        )
        states.poison()
        kv.poison()
        self._page_tokens = page_tokens
        self._caches = LayerCaches(states.layers, kv.layers)
        pages = list(range(count * pages_each))
        random.Random(seed).shuffle(pages)
        self._places = [
            _Place(
                0,
                (1 + 2 * n, 2 + 2 * n),
                ZERO_SLOT,
                tuple(pages[n * pages_each : (n + 1) * pages_each]),
            )
            for n in range(count)
        ]

    @torch.inference_mode()
    def extend(
        self, token_ids: Mapping[int, Sequence[int]], *, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Consume the tokens of some sequences together. Logits of those rows of the batch, by
        default of each sequence's last."""
        sequences = tuple(self._extend_sequence(n, len(ids)) for n, ids in token_ids.items())
        plan = ExtendPlan(self.grid, sequences)
        kv_plan = self._kv_plan({n: len(ids) for n, ids in token_ids.items()})
        if rows is None:
            rows = [end - 1 for end in plan.cu_seqlens[1:]]
        ids = torch.tensor([t for each in token_ids.values() for t in each])
        hidden = self.model.extend(ids, plan, kv_plan, self._caches, list(rows))
        logits = self.model.logits(hidden)
        for (n, _), sequence in zip(token_ids.items(), sequences, strict=True):
            self._places[n].position = sequence.end
            if sequence.boundaries:
                self._places[n].current = sequence.boundaries[-1].state_slot
        return logits

    @torch.inference_mode()
    def decode(self, token_ids: Mapping[int, int]) -> torch.Tensor:
        """Consume one token of some sequences, committing full tails. Their logits."""
        places = {n: self._places[n] for n in token_ids}
        plan = DecodePlan(
            self.grid,
            tuple(place.current for place in places.values()),
            tuple(places),
            tuple(place.position % self.grid for place in places.values()),
        )
        kv_plan = self._kv_plan(dict.fromkeys(token_ids, 1))
        ids = torch.tensor(list(token_ids.values()))
        logits = self.model.decode(ids, plan, kv_plan, self._caches)
        for place in places.values():
            place.position += 1
        full = [n for n, place in places.items() if place.position % self.grid == 0]
        if full:
            fresh = tuple(places[n].spare() for n in full)
            old = tuple(places[n].current for n in full)
            self.model.commit(CommitPlan(self.grid, old, fresh, tuple(full)), self._caches)
            for n, slot in zip(full, fresh, strict=True):
                places[n].current = slot
        return logits

    def _extend_sequence(self, n: int, length: int) -> ExtendSequence:
        place = self._places[n]
        last = (place.position + length) // self.grid * self.grid
        writes: tuple[BoundaryWrite, ...] = ()
        if last > place.position:
            writes = (BoundaryWrite(last, place.spare()),)
        return ExtendSequence(place.position, length, place.current, n, writes)

    def _kv_plan(self, lengths: Mapping[int, int]) -> KvPlan:
        has_pages = self.model.kv_geometry.num_layers > 0
        return KvPlan(
            self._page_tokens,
            tuple(
                KvSequence(
                    self._places[n].position, length, self._places[n].pages if has_pages else ()
                )
                for n, length in lengths.items()
            ),
        )
