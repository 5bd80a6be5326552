# mypy: allow-untyped-calls
"""Attention in Triton: see triton_kernels.py."""

from __future__ import annotations

import torch
import triton

from stateferry_kernels.attention.triton_kernels import (
    attend_kernel,
    join_kernel,
    write_pages_kernel,
)
from stateferry_kernels.attention.triton_tables import kv_tables, kv_tiles
from stateferry_kernels.guards import check_attention_inputs, check_kv_plan
from stateferry_kernels.kv_layer import KvLayer, KvPlan
from stateferry_kernels.triton_inputs import dot_dtype, is_packed, packed

# The fewest rows that a product takes, and those of a prefill's program. fp32 products of more rows
# than the fewest might add in another order, and with wide heads there are no registers for more.
_FEW_ROWS, _MANY_ROWS = 16, 64
# Part of the order of a row's sums, like the blocks' absolute places.
_KEYS, _KEYS_OF_WIDE_HEADS, _WIDE_HEAD = 64, 32, 128
_SEGMENT = 512
# Segments get a program each where fewer programs than these would have them all, and what they
# leave (bytes) does not take too much memory.
_BUSY, _MOST_SCRATCH = 1024, 1 << 28
# Known to be compiled into wrong results on sm90: tiles of 64 rows in pipelined stages.
_FEW_STAGES, _MANY_STAGES = 3, 1


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: KvPlan,
    kv: KvLayer,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Append keys and values to their sequences, then let each row attend to [0, its position].

    Args, what is mutated and errors: as ``attention.torch_ops.attention``; rows of ``out`` must be
               contiguous.
    Precision: sums in fp32 of products in the activation dtype, weights rounded to it. A later
               token of the same block that is not finite reaches back, as 0 * inf is none.
    """
    check_attention_inputs(q, k, v, out, kv, plan.total_tokens)
    check_kv_plan(plan, kv)
    if out.numel() and not is_packed(out):
        raise ValueError("out: a row of heads must be contiguous")
    tokens, pages = kv_tables(plan, q.device)
    if not len(tokens):
        return
    q, k, v = packed(q), packed(k), packed(v)
    _, kv_heads, page_tokens, head_dim = kv.keys.shape
    sizes = {"KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PAGE": page_tokens}
    write_pages_kernel[(len(tokens),)](
        k,
        v,
        kv.keys,
        kv.values,
        tokens,
        pages,
        k.stride(0),
        v.stride(0),
        kv.keys.stride(0),
        kv.values.stride(0),
        pages.stride(0),
        BLOCK=triton.next_power_of_2(kv_heads * head_dim),
        **sizes,
    )
    group = q.shape[1] // kv_heads
    one_each = len(plan.sequences) == plan.total_tokens
    few = one_each or q.dtype == torch.float32 or head_dim > _WIDE_HEAD
    block_rows = max(_FEW_ROWS if few else _MANY_ROWS, triton.next_power_of_2(group))
    most_tokens = 1 if one_each else block_rows // group
    tiles = kv_tiles(plan, most_tokens, q.device)
    work, num_rows = len(tiles) * kv_heads, most_tokens * group
    # As many as the table of pages has room for, which a captured launch cannot outgrow.
    num_segments = triton.cdiv(pages.shape[1] * page_tokens, _SEGMENT)
    if work > _BUSY or 4 * work * num_segments * num_rows * head_dim > _MOST_SCRATCH:
        num_segments = 1
    totals = accs = None
    if num_segments > 1:
        size = (work, num_segments, num_rows, head_dim)
        accs = torch.empty(size, dtype=torch.float32, device=q.device)
        totals = torch.empty((*size[:2], 2, num_rows), dtype=torch.float32, device=q.device)
    sizes |= {
        "GROUP": group,
        "SEGMENT": _SEGMENT,
        "ROWS": num_rows,
        "BLOCK_R": block_rows,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }
    attend_kernel[(work * num_segments,)](
        q,
        out,
        kv.keys,
        kv.values,
        tiles,
        tokens,
        pages,
        totals,
        accs,
        q.stride(0),
        out.stride(0),
        kv.keys.stride(0),
        kv.values.stride(0),
        pages.stride(0),
        num_segments,
        scale,
        DOT=dot_dtype(q.dtype),
        BLOCK_K=_KEYS if head_dim <= _WIDE_HEAD else _KEYS_OF_WIDE_HEADS,
        num_warps=4,
        num_stages=_FEW_STAGES if block_rows < _MANY_ROWS else _MANY_STAGES,
        enable_fp_fusion=False,
        **sizes,
    )
    if num_segments > 1:
        sizes.pop("PAGE")
        join_kernel[(work,)](
            out,
            tiles,
            tokens,
            totals,
            accs,
            out.stride(0),
            num_segments,
            num_warps=4,
            enable_fp_fusion=False,
            **sizes,
        )
