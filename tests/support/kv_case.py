"""Sequences with keys and values in shuffled, poisoned pages, for tests of attention."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence
from stateferry_kernels.operations import Kernels


@dataclass(frozen=True, slots=True)
class Sizes:
    num_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 20
    page_tokens: int = 16

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class Rows:
    """One sequence's inputs, all its tokens."""

    q: torch.Tensor  # (tokens, num_heads, head_dim)
    k: torch.Tensor  # (tokens, kv_heads, head_dim)
    v: torch.Tensor

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.q[rows], self.k[rows], self.v[rows])


def make_rows(sizes: Sizes, tokens: int, dtype: torch.dtype, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(1000 * seed + tokens)

    def drawn(heads: int) -> torch.Tensor:
        # Scores of a wide range, so that the running maximum rises often.
        return (2 * torch.randn(tokens, heads, sizes.head_dim, generator=generator)).to(dtype)

    return Rows(drawn(sizes.num_heads), drawn(sizes.kv_heads), drawn(sizes.kv_heads))


def joined(parts: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("q", "k", "v")))


def poisoned_layer(sizes: Sizes, num_pages: int, dtype: torch.dtype) -> KvLayer:
    """Pages full of NaN, a layer's views into a pool of several layers."""
    shape = (num_pages, 3, sizes.kv_heads, sizes.page_tokens, sizes.head_dim)
    pools = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    return KvLayer(*(pool[:, 1] for pool in pools))


class Reader:
    """Runs sequences of at most ``most`` tokens through one layer; remembers how far each is."""

    def __init__(
        self,
        kernels: Kernels,
        sizes: Sizes,
        most: int,
        dtype: torch.dtype,
        count: int = 1,
        seed: int = 0,
    ) -> None:
        each = -(-most // sizes.page_tokens)
        numbers = list(range(each * count + 2))
        random.Random(seed).shuffle(numbers)
        self.kernels, self.sizes = kernels, sizes
        self.pages = [tuple(numbers[each * i : each * (i + 1)]) for i in range(count)]
        self.spare = numbers[each * count :]
        self.layer = poisoned_layer(sizes, len(numbers), dtype)
        self.positions = [0] * count

    def run(self, parts: dict[int, Rows]) -> list[torch.Tensor]:
        """Consume the next rows of some sequences in one call; returns their outputs."""
        sequences = tuple(
            KvSequence(self.positions[i], len(part), self.pages[i]) for i, part in parts.items()
        )
        rows = joined(list(parts.values()))
        out = torch.full_like(rows.q, torch.nan)
        self.kernels.attention(
            rows.q,
            rows.k,
            rows.v,
            plan=KvPlan(self.sizes.page_tokens, sequences),
            kv=self.layer,
            scale=self.sizes.scale,
            out=out,
        )
        for i, part in parts.items():
            self.positions[i] += len(part)
        return list(out.split([len(part) for part in parts.values()]))

    def walk(self, rows: Rows, cuts: Sequence[int], number: int = 0) -> torch.Tensor:
        """Outputs of a sequence that is cut at these positions."""
        edges = [0, *cuts, len(rows)]
        pieces = [rows[a:b] for a, b in pairwise(edges) if b > a]
        return torch.cat([self.run({number: piece})[0] for piece in pieces])
