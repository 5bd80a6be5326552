"""Attention of hybrid models' layers: decode rows of long sequences and a prefill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.rows import OURS, Row, rows_of
from bench.gpu.timing import Call, repeated, times_us
from bench.gpu.workload import DEVICE, DTYPE
from stateferry_kernels.attention import triton_ops
from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence

# Heads, heads of the keys, head_dim: by the models' public configs.
HEADS = {"Nemotron-Nano-9B-v2": (40, 8, 128), "Falcon-H1-7B": (12, 2, 128)}
# Sequences, tokens that each has with the new ones, new ones of each.
CASES = {
    "decode 1 x 2k": (1, 2048, 1),
    "decode 1 x 32k": (1, 32768, 1),
    "decode 1 x 128k": (1, 131072, 1),
    "decode 64 x 2k": (64, 2048, 1),
    "prefill 1 x 8k": (1, 8192, 8192),
}
PAGE = 64
UNDIVIDED = f"{OURS}, undivided"


def bench_attention(shape: str, case: str, tbs: float) -> list[Row]:
    """Ours over pages, each sequence's keys divided over programs and not; torch's over keys and
    values that lie together. floor: of the keys and values, read once, for decode rows."""
    heads, kv_heads, head_dim = HEADS[shape]
    count, length, new = CASES[case]
    pages = length // PAGE
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=DTYPE)

    kv = KvLayer(*(normal(count * pages, kv_heads, PAGE, head_dim) for _ in range(2)))
    q = normal(count * new, heads, head_dim)
    k, v = (normal(count * new, kv_heads, head_dim) for _ in range(2))
    plan = KvPlan(
        PAGE,
        tuple(
            KvSequence(length - new, new, tuple(range(i * pages, (i + 1) * pages)))
            for i in range(count)
        ),
    )
    out = torch.empty_like(q)
    scale = head_dim**-0.5
    ours = partial(triton_ops.attention, q, k, v, plan=plan, kv=kv, scale=scale, out=out)
    apart = [normal(count, kv_heads, length, head_dim) for _ in range(2)]
    theirs = partial(
        scaled_dot_product_attention,
        q.unflatten(0, (count, new)).transpose(1, 2).contiguous(),
        *apart,
        is_causal=new > 1,
        enable_gqa=True,
    )
    ours()
    divided = out.clone()

    def undivided() -> None:
        with _undivided():
            ours()

    undivided()
    if not torch.equal(out, divided):
        raise ValueError(f"{shape}, {case}: dividing a sequence changed its bits")
    contenders: dict[str, list[Call]] = {
        OURS: repeated(ours, 3),
        "torch sdpa": repeated(theirs, 3),
    }
    floors = {}
    if new == 1:
        contenders[UNDIVIDED] = repeated(undivided, 3)
        floors[OURS] = (kv.keys.nbytes + kv.values.nbytes) / tbs / 1e6
    return rows_of("attention", shape, case, times_us(contenders), floors)


@contextmanager
def _undivided() -> Iterator[None]:
    busy, triton_ops._BUSY = triton_ops._BUSY, 0
    try:
        yield
    finally:
        triton_ops._BUSY = busy
