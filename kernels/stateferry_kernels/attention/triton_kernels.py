# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Causal grouped-query attention over pages in Triton.

A program has some tokens of one sequence and the query heads that share one head of the keys: its
rows are (token, head) pairs. It walks the keys in blocks from position 0, with a running maximum:

    weights = exp(scores - highest so far)        rounded to the activation dtype
    total   = total exp(before - highest) + sum of weights
    acc     = acc   exp(before - highest) + weights . values
    y       = acc / total

The blocks lie at absolute positions, and keys past a row weigh exactly zero, so a row's bits do not
depend on cuts, neighbours or page numbers. The sum of the weights is a product with ones: products
add in an order of their own, sums of a tile's row in one that depends on the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stateferry_kernels.triton_math import LOG2_E, exp2, round_to


@triton.jit
def write_pages_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    tokens_ptr,
    pages_ptr,
    k_stride,
    v_stride,
    keys_stride,
    values_stride,
    pages_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token's keys and values to its place. Rows of tokens: sequence, position; -1 for a row
    that is padding."""
    token = tl.program_id(0).to(tl.int64)
    sequence = tl.load(tokens_ptr + token * 2)
    if sequence < 0:
        return
    position = tl.load(tokens_ptr + token * 2 + 1)
    page = tl.load(pages_ptr + sequence * pages_stride + position // PAGE)
    i = tl.arange(0, BLOCK)
    mask = i < KV_HEADS * HEAD_DIM
    place = (i // HEAD_DIM * PAGE + position % PAGE) * HEAD_DIM + i % HEAD_DIM
    k = tl.load(k_ptr + token * k_stride + i, mask=mask)
    tl.store(keys_ptr + page * keys_stride + place, k, mask=mask)
    v = tl.load(v_ptr + token * v_stride + i, mask=mask)
    tl.store(values_ptr + page * values_stride + place, v, mask=mask)


@triton.jit
def attend_kernel(
    q_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    tiles_ptr,
    tokens_ptr,
    pages_ptr,
    q_stride,
    out_stride,
    keys_stride,
    values_stride,
    pages_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of tokens and head of the keys. Rows of tiles: first token in the batch, tokens,
    sequence; -1 for a tile that is padding."""
    entry = tiles_ptr + (tl.program_id(0) // KV_HEADS).to(tl.int64) * 3
    kv_head = tl.program_id(0) % KV_HEADS
    first, count, sequence = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if sequence < 0:
        return
    r = tl.arange(0, BLOCK_R)
    is_row = r // GROUP < count
    token = first + r // GROUP
    position = tl.load(tokens_ptr + token * 2 + 1, mask=is_row, other=0)
    end = tl.load(tokens_ptr + (first + count - 1) * 2 + 1) + 1
    d = tl.arange(0, BLOCK_D)
    in_d = d < HEAD_DIM
    column = (kv_head * GROUP + r % GROUP)[:, None] * HEAD_DIM + d[None, :]
    mask = is_row[:, None] & in_d[None, :]
    q = tl.load(q_ptr + token[:, None] * q_stride + column, mask=mask, other=0.0).to(DOT)
    pages = pages_ptr + sequence * pages_stride
    ones = tl.full((BLOCK_K, 16), 1.0, dtype=DOT)

    highest = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R, 16), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for begin in range(0, end, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        is_key = k < end
        page = tl.load(pages + k // PAGE, mask=is_key, other=0)
        place = (kv_head * PAGE + k % PAGE) * HEAD_DIM
        in_keys = is_key[:, None] & in_d[None, :]
        places = (page * keys_stride + place)[:, None] + d[None, :]
        keys = tl.load(keys_ptr + places, mask=in_keys, other=0.0).to(DOT)
        places = (page * values_stride + place)[:, None] + d[None, :]
        values = tl.load(values_ptr + places, mask=in_keys, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(k[None, :] > position[:, None], -float("inf"), scores)
        risen = tl.maximum(highest, tl.max(scores, axis=1))
        weights = round_to(exp2(scores - risen[:, None]), DOT)
        remains = exp2(highest - risen)[:, None]
        # Not a sum: one of a product and something else would be joined with the product.
        added = tl.dot(weights, ones, input_precision="ieee")
        total = tl.fma(total, tl.broadcast_to(remains, total.shape), added)
        added = tl.dot(weights, values, input_precision="ieee")
        acc = tl.fma(acc, tl.broadcast_to(remains, acc.shape), added)
        highest = risen
    # The columns of total are alike.
    y = acc / tl.max(total, axis=1)[:, None]
    outs = out_ptr + token[:, None] * out_stride + column
    tl.store(outs, round_to(y, out_ptr.dtype.element_ty), mask=mask)
