"""What is measured, and at which sizes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Shape:
    """One layer; the defaults are those of mamba2-130m."""

    nheads: int = 24
    headdim: int = 64
    dstate: int = 128
    ngroups: int = 1
    d_conv: int = 4
    grid: int = 64

    @property
    def d_inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.dstate

    def state_bytes(self, state_dtype: torch.dtype) -> int:
        """One sequence's recurrent state in one layer."""
        return self.d_inner * self.dstate * state_dtype.itemsize

    def scan_flops(self, length: int) -> int:
        """Of ``length`` tokens from the grid, counting pairs of tokens once, as causality leaves
        them.

        Per token 4 N H P for the state (two multiply-adds per element: into it and out of it), and
        of the grid x grid blocks of a chunk the half below the diagonal: Q H P to apply, Q N G to
        compute. Elementwise work is not counted.
        """
        pairs = self.grid * (self.d_inner + self.dstate * self.ngroups)
        return length * (4 * self.dstate * self.d_inner + pairs)

    def scan_flops_dense(self, length: int) -> int:
        """The same with whole blocks, as a block-matmul computes them."""
        pairs = 2 * self.grid * (self.d_inner + self.dstate * self.ngroups)
        return length * (4 * self.dstate * self.d_inner + pairs)


@dataclass(frozen=True)
class Workload:
    """Sizes, and how long to look at each."""

    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    # Of the activations and of the states, in decode.
    decode_dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] = (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    )
    batches: tuple[int, ...] = (1, 8, 64)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    # The length whose ratios are reported.
    main_length: int = 2048
    chunk_sizes: tuple[int, ...] = (64, 128, 256)
    matmul_sizes: tuple[int, ...] = (1024, 2048)
    # (in, out): in_proj, out_proj and the head of mamba2-130m.
    linears: tuple[tuple[int, int], ...] = ((768, 3352), (1536, 768), (768, 32000))
    linear_rows: tuple[int, ...] = (1, 8, 16, 64, 512)
    verify_batches: tuple[int, ...] = (1, 8)
    verify_tokens: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    # Buffers that a group of measurements rotates through: a model's layers, as far as they fit.
    layers: int = 24
    pool_bytes: int = 1 << 30
    weight_bytes: int = 96 << 20
    # Above this a projection is left out: torch takes seconds for it in bf16.
    linear_flops: int = 5_000_000_000
    rounds: int = 7
    sample_s: float = 0.02
    group_s: float = 2.5

    def layers_of(self, layer_bytes: int, share: float = 1.0) -> int:
        """How many layers of this size fit in a share of the buffers."""
        return max(1, min(self.layers, int(self.pool_bytes * share) // layer_bytes))

    def decode_bytes(self, batch: int) -> int:
        """States of a batch in one layer, fp32."""
        return batch * self.shape.state_bytes(torch.float32)


def quick(shape: Shape, seed: int, threads: int) -> Workload:
    """A look in half a minute."""
    return Workload(
        shape=shape,
        seed=seed,
        threads=threads,
        decode_dtypes=((torch.float32, torch.float32),),
        lengths=(512, 2048),
        linear_rows=(1, 8),
        verify_tokens=(1, 4, 8),
        pool_bytes=400 << 20,
        rounds=3,
        sample_s=0.01,
        group_s=1.0,
    )


def tiny(seed: int) -> Workload:
    """Milliseconds, to see that every row comes out; the times mean nothing."""
    return Workload(
        shape=Shape(nheads=4, headdim=8, dstate=8, ngroups=2, grid=16),
        seed=seed,
        threads=1,
        batches=(1, 2),
        lengths=(32, 50),
        main_length=50,
        chunk_sizes=(8, 16),
        matmul_sizes=(16,),
        linears=((16, 24), (24, 16)),
        linear_rows=(1, 8),
        verify_batches=(1, 2),
        verify_tokens=(1, 3),
        layers=2,
        weight_bytes=8 << 10,
        rounds=2,
        sample_s=0.0,
        group_s=math.inf,
    )
