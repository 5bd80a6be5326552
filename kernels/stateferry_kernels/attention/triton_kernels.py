# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Causal grouped-query attention over pages in Triton.

A program has some tokens of one sequence and the query heads that share one head of the keys: its
rows are (token, head) pairs. It walks the keys in blocks from position 0, with a running maximum:

    weights = exp(scores - highest so far)        rounded to the activation dtype
    total   = total exp(before - highest) + sum of weights
    acc     = acc   exp(before - highest) + weights . values
    y       = acc / total

Every SEGMENT keys it begins anew, and then joins what it has to what it had, which is the same
arithmetic. So a program may walk a row's segments one after the other, or one each: that is how a
few rows of long sequences keep a GPU busy, and the bits are the same.

Blocks and segments lie at absolute positions, and keys past a row weigh exactly zero, so a row's
bits do not depend on cuts, neighbours or page numbers. The sum of the weights is a product with
ones: products add in an order of their own, sums of a tile's row in one that depends on the tile.
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
def _nothing(BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr):
    """highest, total and acc of no keys."""
    highest = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R, COLUMNS), dtype=tl.float32)
    return highest, total, tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)


@triton.jit
def _joined(one, other):
    """What two runs of keys amount to, the earlier one first: highest, total and acc of each."""
    highest, total, acc = one
    risen = tl.maximum(highest, other[0])
    remains, grown = exp2(highest - risen)[:, None], exp2(other[0] - risen)[:, None]
    total = tl.fma(total, tl.broadcast_to(remains, total.shape), other[1] * grown)
    acc = tl.fma(acc, tl.broadcast_to(remains, acc.shape), other[2] * grown)
    return risen, total, acc


@triton.jit
def _segment(
    q, rows, begin, end, pointers, strides, scale,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, DOT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """highest, total and acc of the keys [begin, end)."""
    position, kv_head, d = rows
    keys_ptr, values_ptr, pages = pointers
    keys_stride, values_stride = strides
    in_d = d < HEAD_DIM
    ones = tl.full((BLOCK_K, 16), 1.0, dtype=DOT)
    highest, total, acc = _nothing(q.shape[0], q.shape[1], 16)
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
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
        # A row may lie before the whole segment, if its tile's last one does not.
        finite = tl.where(risen == -float("inf"), 0.0, risen)
        weights = round_to(exp2(scores - finite[:, None]), DOT)
        remains = exp2(highest - finite)[:, None]
        # Not a sum: one of a product and something else would be joined with the product.
        added = tl.dot(weights, ones, input_precision="ieee")
        total = tl.fma(total, tl.broadcast_to(remains, total.shape), added)
        added = tl.dot(weights, values, input_precision="ieee")
        acc = tl.fma(acc, tl.broadcast_to(remains, acc.shape), added)
        highest = risen
    # The columns of total are alike.
    return highest, tl.max(total, axis=1)[:, None], acc


@triton.jit
def _tile_rows(tiles_ptr, tokens_ptr, tile, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
    """A tile's rows, (token, head) pairs: tokens, positions, whether there is a row, and the end of
    the keys that the last one takes."""
    first, count = tl.load(tiles_ptr + tile * 3), tl.load(tiles_ptr + tile * 3 + 1)
    r = tl.arange(0, BLOCK_R)
    is_row = r // GROUP < count
    token = first + r // GROUP
    position = tl.load(tokens_ptr + token * 2 + 1, mask=is_row, other=0)
    end = tl.load(tokens_ptr + (first + count - 1) * 2 + 1) + 1
    return token, position, is_row, end


@triton.jit
def attend_kernel(
    q_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    tiles_ptr,
    tokens_ptr,
    pages_ptr,
    totals_ptr,
    accs_ptr,
    q_stride,
    out_stride,
    keys_stride,
    values_stride,
    pages_stride,
    num_segments,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    DOT: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of tokens and head of the keys. Rows of tiles: first token in the batch, tokens,
    sequence; -1 for a tile that is padding. With totals_ptr one of num_segments as well, for
    join_kernel: totals (tiles, KV_HEADS, num_segments, 2, ROWS) of highest and total, accs (tiles,
    KV_HEADS, num_segments, ROWS, HEAD_DIM), both fp32, written for segments that there are."""
    program = tl.program_id(0) // num_segments
    tile = (program // KV_HEADS).to(tl.int64)
    kv_head = program % KV_HEADS
    sequence = tl.load(tiles_ptr + tile * 3 + 2)
    if sequence < 0:
        return
    token, position, is_row, end = _tile_rows(tiles_ptr, tokens_ptr, tile, GROUP, BLOCK_R)
    begin = tl.program_id(0) % num_segments * SEGMENT
    if begin >= end:
        return
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HEAD_DIM
    column = (kv_head * GROUP + r % GROUP)[:, None] * HEAD_DIM + d[None, :]
    mask = is_row[:, None] & in_d[None, :]
    q = tl.load(q_ptr + token[:, None] * q_stride + column, mask=mask, other=0.0).to(DOT)
    rows = (position, kv_head, d)
    pointers = (keys_ptr, values_ptr, pages_ptr + sequence * pages_stride)
    strides = (keys_stride, values_stride)
    if totals_ptr is not None:
        highest, total, acc = _segment(
            q, rows, begin, tl.minimum(begin + SEGMENT, end), pointers, strides, scale, HEAD_DIM,
            PAGE, DOT, BLOCK_K,
        )  # fmt: skip
        number = tl.program_id(0).to(tl.int64)
        tl.store(totals_ptr + number * (2 * ROWS) + r, highest, mask=r < ROWS)
        totals = totals_ptr + number * (2 * ROWS) + ROWS + r
        tl.store(totals[:, None], total, mask=(r < ROWS)[:, None])
        accs = accs_ptr + (number * ROWS + r[:, None]) * HEAD_DIM + d[None, :]
        tl.store(accs, acc, mask=(r < ROWS)[:, None] & in_d[None, :])
    else:
        found = _nothing(BLOCK_R, BLOCK_D, 1)
        for first in range(0, end, SEGMENT):
            other = _segment(
                q, rows, first, tl.minimum(first + SEGMENT, end), pointers, strides, scale,
                HEAD_DIM, PAGE, DOT, BLOCK_K,
            )  # fmt: skip
            found = _joined(found, other)
        y = found[2] / found[1]
        outs = out_ptr + token[:, None] * out_stride + column
        tl.store(outs, round_to(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def join_kernel(
    out_ptr,
    tiles_ptr,
    tokens_ptr,
    totals_ptr,
    accs_ptr,
    out_stride,
    num_segments,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows of one tile and head of the keys from the segments that attend_kernel left."""
    tile = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    if tl.load(tiles_ptr + tile * 3 + 2) < 0:
        return
    token, _, is_row, end = _tile_rows(tiles_ptr, tokens_ptr, tile, GROUP, BLOCK_R)
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (d < HEAD_DIM)[None, :]
    first = tl.program_id(0).to(tl.int64) * num_segments
    totals = totals_ptr + first * (2 * ROWS) + r
    accs = accs_ptr + (first * ROWS + r[:, None]) * HEAD_DIM + d[None, :]
    highest, total, acc = _nothing(BLOCK_R, BLOCK_D, 1)
    for number in range(tl.cdiv(end, SEGMENT)):
        other = (
            tl.load(totals + number * (2 * ROWS), mask=is_row, other=0.0),
            tl.load(totals + number * (2 * ROWS) + ROWS, mask=is_row, other=1.0)[:, None],
            tl.load(accs + number * (ROWS * HEAD_DIM), mask=mask, other=0.0),
        )
        highest, total, acc = _joined((highest, total, acc), other)
    y = acc / total
    column = (kv_head * GROUP + r % GROUP)[:, None] * HEAD_DIM + d[None, :]
    outs = out_ptr + token[:, None] * out_stride + column
    tl.store(outs, round_to(y, out_ptr.dtype.element_ty), mask=mask)
