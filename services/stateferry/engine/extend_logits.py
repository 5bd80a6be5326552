"""Which rows of an extend need logits, what they follow from, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stateferry.core.errors import InvariantViolation
from stateferry.core.sampling import SampledToken
from stateferry.engine.forward_batch import ExtendBatch, ExtendRow
from stateferry.engine.sampler import is_greedy, sample


def rows_with_logits(batch: ExtendBatch, cu_seqlens: Sequence[int]) -> list[int]:
    """Packed rows: all of a sequence whose prompt is scored, the last one of one that samples."""
    rows: list[int] = []
    for row, begin, end in zip(batch.computed, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if row.scores is not None:
            rows += range(begin, end)
        elif row.sample is not None:
            rows.append(end - 1)
    return rows


def keep_finals(batch: ExtendBatch, hidden: torch.Tensor) -> torch.Tensor:
    """hidden (rows_with_logits, d_model) of the computed rows. Leaves to each lease whose tokens
    are kept what its token 0 follows from; returns ``hidden`` with that of known prompts added."""
    taken = 0
    known = []
    for row in batch.rows:
        if not row.token_ids:
            known.append(known_final(row))
            continue
        taken += len(row.token_ids) if row.scores is not None else int(row.sample is not None)
        if row.sample is not None and row.lease.tokens is not None:
            # A copy: the rest of the step's memory need not live as long.
            row.lease.final = hidden[taken - 1 : taken].clone()
    return torch.cat([hidden, *known]) if known else hidden


def known_final(row: ExtendRow) -> torch.Tensor:
    """(1, d_model) of a prompt that needs no forward."""
    final = row.lease.final
    if not isinstance(final, torch.Tensor):
        raise InvariantViolation("a prompt that was not computed has no final vector")
    return final


def wants_likeliest_alone(batch: ExtendBatch) -> bool:
    """Whether the logits are for nothing but the largest of each row."""
    samples = [row.sample for row in batch.rows if row.sample is not None]
    return (
        bool(samples)
        and all(map(is_greedy, samples))
        and all(row.scores is None for row in batch.rows)
    )


def take_logits(
    batch: ExtendBatch, starts: Sequence[int], logits: torch.Tensor
) -> list[SampledToken | None]:
    """Score prompts, then sample. ``starts`` are the sequences' positions before the pass; logits
    (rows of ``keep_finals``, vocab_size). One entry per row that samples, in order."""
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
