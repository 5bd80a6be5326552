"""Sequences' keys and values in their pages, by torch's indexing."""

from __future__ import annotations

import torch

from stateferry_kernels.kv_layer import KvLayer, KvPlan, KvSequence


def write_pages(k: torch.Tensor, v: torch.Tensor, plan: KvPlan, kv: KvLayer) -> None:
    """Put k and v (total_tokens, kv_heads, head_dim) at their sequences' positions."""
    key = f"places:{k.device}"
    if key not in plan.cache:
        size = plan.page_tokens
        places = [
            (sequence.pages[position // size], position % size)
            for sequence in plan.sequences
            for position in range(sequence.start, sequence.end)
        ]
        table = torch.tensor(places, dtype=torch.int64, device=k.device).view(-1, 2)
        plan.cache[key] = table.T.contiguous().unbind()
    pages, rows = plan.cache[key]
    kv.keys[pages, :, rows] = k
    kv.values[pages, :, rows] = v


def sequence_keys(pool: torch.Tensor, sequence: KvSequence) -> torch.Tensor:
    """(kv_heads, end, head_dim): what lies at the sequence's positions [0, end) of a pool
    (num_pages, kv_heads, page_tokens, head_dim), copied."""
    _, kv_heads, page_tokens, head_dim = pool.shape
    used = -(-sequence.end // page_tokens)
    pages = torch.tensor(sequence.pages[:used], dtype=torch.int64, device=pool.device)
    tokens = pool[pages].transpose(0, 1).reshape(kv_heads, used * page_tokens, head_dim)
    return tokens[:, : sequence.end]
