"""Which rows of an extend need logits, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stateferry.core.sampling import SampledToken
from stateferry.engine.forward_batch import ExtendBatch
from stateferry.engine.sampler import sample


def rows_with_logits(batch: ExtendBatch, cu_seqlens: Sequence[int]) -> list[int]:
    """Packed rows: all of a sequence whose prompt is scored, the last one of one that samples."""
    rows: list[int] = []
    for row, begin, end in zip(batch.rows, cu_seqlens, cu_seqlens[1:], strict=False):
        if row.scores is not None:
            rows += range(begin, end)
        elif row.sample is not None:
            rows.append(end - 1)
    return rows


def take_logits(
    batch: ExtendBatch, starts: Sequence[int], logits: torch.Tensor
) -> list[SampledToken | None]:
    """Score prompts, then sample. ``starts`` are the sequences' positions before the pass; logits
    (rows_with_logits, vocab_size). One entry per row that samples, in order."""
    sampling_rows, specs, taken = [], [], 0
    for row, start in zip(batch.rows, starts, strict=True):
        num_rows = int(row.sample is not None)
        if row.scores is not None:
            num_rows = len(row.token_ids)
            row.scores.add(start, logits[taken : taken + num_rows])
        taken += num_rows
        if row.sample is not None:
            sampling_rows.append(taken - 1)
            specs.append(row.sample)
    return sample(logits if len(specs) == taken else logits[sampling_rows], specs)
