"""Attention in torch operations.

A row walks its keys in blocks of KEY_BLOCK from position 0, with a running maximum, as
native/src/attention.h does. Each product has the same shape whatever the sequence's length (rows
padded as row_tile.py says, keys to a whole block), so that a row's bits do not depend on cuts. One
thing does reach back: a later token of the same block that is not finite, as 0 * inf is none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stateferry_kernels.attention.pages import sequence_keys, write_pages
from stateferry_kernels.guards import check_attention_inputs, check_kv_plan
from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence
from stateferry_kernels.row_tile import bmm_rows

KEY_BLOCK = 256


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

    Args:     q, out (total_tokens, num_heads, head_dim) and k, v (total_tokens, kv_heads, head_dim)
              of the pages' dtype, fp32 or bf16, rows in the plan's order, k after rotary. Query
              heads [g * i, g * (i + 1)) share head i of the keys. scale: of the products q . k.
    Mutates:  out; kv.keys and kv.values at each sequence's positions [start, end).
    Raises:   TypeError, ValueError on a mismatch, pages that are too few, not there, or shared with
              a sequence that writes them.
    """
    check_attention_inputs(q, k, v, out, kv, plan.total_tokens)
    check_kv_plan(plan, kv)
    write_pages(k, v, plan, kv)
    first = 0
    for sequence in plan.sequences:
        rows = slice(first, first + sequence.length)
        if sequence.length:
            out[rows] = _attend(q[rows], sequence, kv, scale)
        first = rows.stop


def _attend(q: torch.Tensor, sequence: KvSequence, kv: KvLayer, scale: float) -> torch.Tensor:
    length, num_heads, head_dim = q.shape
    keys, values = (sequence_keys(pool, sequence).float() for pool in (kv.keys, kv.values))
    kv_heads = keys.shape[0]
    # (kv_heads, length * group, head_dim): a head's rows together.
    rows = q.float().view(length, kv_heads, -1, head_dim).transpose(0, 1)
    rows = rows.reshape(kv_heads, -1, head_dim)
    positions = torch.arange(sequence.start, sequence.end, device=q.device)
    positions = positions.repeat_interleave(num_heads // kv_heads)[:, None]
    highest = rows.new_full((*rows.shape[:2], 1), -torch.inf)
    total, summed = torch.zeros_like(highest), torch.zeros_like(rows)
    for begin in range(0, sequence.end, KEY_BLOCK):
        block = slice(begin, begin + KEY_BLOCK)
        scores = scale * bmm_rows(rows, _whole_block(keys[:, block]).mT)
        ahead = torch.arange(begin, begin + KEY_BLOCK, device=q.device) > positions
        scores = scores.masked_fill(ahead, -torch.inf)
        risen = torch.maximum(highest, scores.amax(-1, keepdim=True))
        remains, weights = torch.exp(highest - risen), torch.exp(scores - risen)
        total = total * remains + weights.sum(-1, keepdim=True)
        summed = summed * remains + bmm_rows(weights, _whole_block(values[:, block]))
        highest = risen
    heads = (summed / total).view(kv_heads, length, -1, head_dim).transpose(0, 1)
    return heads.reshape(q.shape).to(q.dtype)


def _whole_block(tokens: torch.Tensor) -> torch.Tensor:
    """tokens (kv_heads, n, head_dim) with zeros after them up to KEY_BLOCK."""
    short = KEY_BLOCK - tokens.shape[1]
    return F.pad(tokens, (0, 0, 0, short)) if short else tokens
