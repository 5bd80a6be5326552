"""What a hand-off of public models weighs, from the sizes in their configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stateferry.transfer.blocking import Bytes
from stateferry.transfer.manifest import Segment, SegmentKind

_FP32, _BF16 = 4, 2
_CONV_COLUMNS = 3
# Longer segments take the rest in one piece; this only keeps the lists short.
_PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ModelShape:
    """``nheads``, ``head_dim``, ``d_state`` and ``ngroups`` are of one recurrent layer."""

    name: str
    mamba_layers: int
    nheads: int
    head_dim: int
    d_state: int
    ngroups: int
    attention_layers: int = 0
    kv_heads: int = 0
    kv_head_dim: int = 0

    @property
    def ssm_bytes(self) -> int:
        """Of one layer, fp32."""
        return self.nheads * self.head_dim * self.d_state * _FP32

    @property
    def conv_bytes(self) -> int:
        """Of one layer, bf16: three columns of x, B and C."""
        channels = self.nheads * self.head_dim + 2 * self.ngroups * self.d_state
        return channels * _CONV_COLUMNS * _BF16

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one attention layer, bf16, keys and values."""
        return 2 * self.kv_heads * self.kv_head_dim * _BF16

    def total_bytes(self, tokens: int) -> int:
        """The whole state of a prompt of ``tokens``; KV in full pages."""
        fixed = self.mamba_layers * (self.ssm_bytes + self.conv_bytes)
        return fixed + self.attention_layers * self._kv_layer_bytes(tokens)

    def segment_sizes(self, tokens: int, max_bytes: int) -> list[tuple[SegmentKind, int, int]]:
        """(kind, layer, bytes) of what is sent: KV cut evenly where the whole is over the cap."""
        left = max_bytes - self.total_bytes(0)
        sizes = []
        for layer in range(self.mamba_layers):
            sizes.append((SegmentKind.SSM_STATE, layer, self.ssm_bytes))
            sizes.append((SegmentKind.CONV_STATE, layer, self.conv_bytes))
        for layer in range(self.attention_layers):
            whole = self._kv_layer_bytes(tokens)
            sizes.append((SegmentKind.KV_PAGES, layer, min(whole, left // self.attention_layers)))
        return sizes

    def _kv_layer_bytes(self, tokens: int) -> int:
        pages = math.ceil(tokens / _PAGE_TOKENS)
        return pages * _PAGE_TOKENS * self.kv_bytes_per_token


SHAPES = (
    ModelShape("Nemotron-Nano-9B-v2", 27, 128, 80, 128, 8, 4, 8, 128),
    ModelShape("Falcon-H1-7B", 44, 24, 128, 256, 1, 44, 2, 128),
    ModelShape("Mamba2-2.7B", 64, 80, 64, 128, 1),
)
PROMPTS = (1 << 10, 8 << 10, 64 << 10)


def segments_in(memory: Bytes, sizes: list[tuple[SegmentKind, int, int]]) -> list[Segment]:
    """Segments of these sizes, one behind the other in ``memory``."""
    return list(_cut(memory, sizes))


def even_segments(memory: Bytes, size_bytes: int, layers: int = 24) -> list[Segment]:
    """The first ``size_bytes`` of ``memory`` as the states of ``layers`` layers."""
    cuts = np.linspace(0, size_bytes, layers + 1).astype(int)
    sizes = [(SegmentKind.SSM_STATE, n, int(cuts[n + 1] - cuts[n])) for n in range(layers)]
    return list(_cut(memory, sizes))


def _cut(memory: Bytes, sizes: list[tuple[SegmentKind, int, int]]) -> Iterator[Segment]:
    end = 0
    for kind, layer, size_bytes in sizes:
        start, end = end, end + size_bytes
        yield Segment(kind, layer, "uint8", (size_bytes,), memory[start:end])
