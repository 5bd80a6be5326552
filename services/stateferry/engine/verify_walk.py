"""From the logits of a verification to tokens: every token is the one that a step without a draft
would have chosen, of the same logits, by the same rule.

A guess is right when it is what the sampler chooses after the tokens before it. The random number
of a token depends on its seed and index alone, so a sampled stream is the same with drafts, with
others, and without any; its distribution is the target's because it is the target's own choice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from stateferry.core.sampling import SampledToken
from stateferry.engine.forward_batch import SampleSpec
from stateferry.engine.sampler import is_greedy, likeliest_ids, sample_row
from stateferry.engine.verify_batch import Run, VerifyBatch, VerifyInput


def walk(logits: torch.Tensor, batch: VerifyBatch) -> list[Run]:
    """logits (num_rows, vocab_size) fp32, packed as the batch is, not changed; the rules of its
    sequences are told of what was chosen."""
    rows = _Rows(logits)
    runs, first = [], 0
    for row in batch.rows:
        runs.append(_run(rows, first, row))
        first += row.num_rows
    return runs


class _Rows:
    """Packed logits, which come to the host only if more is asked than the likeliest."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits
        self._on_host: npt.NDArray[np.float32] | None = None
        self._ids, self._finite = likeliest_ids(logits)

    def choose(self, row: int, spec: SampleSpec) -> SampledToken | None:
        if not self._finite[row]:
            return None
        if is_greedy(spec):
            return SampledToken(self._ids[row])
        if self._on_host is None:
            self._on_host = self._logits.cpu().numpy()
        return sample_row(self._on_host[row], self._ids[row], spec)


def _run(rows: _Rows, first: int, row: VerifyInput) -> Run:
    children: dict[tuple[int, int], int] = {
        (parent, token_id): node
        for node, (parent, token_id) in enumerate(zip(row.parents, row.row_ids, strict=True))
    }
    tokens: list[SampledToken] = []
    path: list[int] = []
    node: int | None = 0
    while node is not None:
        index = row.index + len(tokens)
        token = rows.choose(first + node, row.spec_of(index))
        if token is None:
            # The token that leads here was chosen; whoever consumes it next will meet the same.
            break
        tokens.append(token)
        path.append(node)
        if row.stop.check(token.token_id, index + 1) is not None:
            break
        node = children.get((node, token.token_id))
    return Run(tuple(tokens), tuple(path))
