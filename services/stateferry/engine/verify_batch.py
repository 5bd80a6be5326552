"""What one verification works on: of each sequence its last token, and guesses at what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stateferry.cache.lease import SequenceLease
from stateferry.core.sampling import SampledToken, StopConditions
from stateferry.drafting.tree import DraftTree
from stateferry.engine.forward_batch import SampleSpec
from stateferry_kernels.draft_plans import (
    ROOT,
    AcceptPlan,
    AcceptSequence,
    VerifyPlan,
    VerifySequence,
)
from stateferry_kernels.kv_layer import KvPlan, KvSequence
from stateferry_kernels.layer_state import PAD_SLOT


@dataclass(frozen=True, slots=True)
class VerifyInput:
    """One sequence: ``token_id`` was its output token ``index - 1`` and is consumed; ``draft`` is
    guessed to follow. ``spec_of`` says how an output token is chosen, by its index; ``stop`` after
    which no other follows."""

    lease: SequenceLease
    token_id: int
    index: int
    draft: DraftTree
    spec_of: Callable[[int], SampleSpec]
    stop: StopConditions

    @property
    def num_rows(self) -> int:
        return 1 + len(self.draft)

    @property
    def row_ids(self) -> tuple[int, ...]:
        """What the rows consume: node 0 is ``token_id``, and the draft hangs from it."""
        return (self.token_id, *self.draft.token_ids)

    @property
    def parents(self) -> tuple[int, ...]:
        return (ROOT, *(parent + 1 for parent in self.draft.parents))


@dataclass(frozen=True, slots=True)
class Run:
    """What a verification gave one sequence: output tokens, and the nodes that it consumed on the
    way, one for each, node 0 first. No tokens: the row's logits were not finite, or its rules
    broke, and nothing was consumed."""

    tokens: tuple[SampledToken, ...] = ()
    path: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True, slots=True)
class VerifyBatch:
    """Any number of sequences, each with a draft or without. A sequence's rows lie in the draft
    page of its number in the batch."""

    rows: tuple[VerifyInput, ...]

    def token_ids(self) -> list[int]:
        """(num_rows,) packed."""
        return [i for row in self.rows for i in row.row_ids]

    def plan(self, grid: int) -> VerifyPlan:
        """Where each sequence reads; it writes to draft pages alone."""
        return VerifyPlan(
            grid,
            tuple(
                VerifySequence(
                    state_slot=row.lease.state_slot,
                    tail_page=row.lease.tail_page,
                    tail_rows=row.lease.position % grid,
                    draft_page=number,
                    parents=row.parents,
                )
                for number, row in enumerate(self.rows)
            ),
        )

    def kv_plan(self, page_tokens: int) -> KvPlan:
        """Where keys and values of the rows of chains go: behind the sequences' ends."""
        return KvPlan(
            page_tokens,
            tuple(
                KvSequence(row.lease.position, row.num_rows, row.lease.kv_pages)
                for row in self.rows
            ),
        )

    def places(self) -> list[AcceptPlace]:
        """What ``accept_plan`` needs of the leases as they are now."""
        return [AcceptPlace.of(row.lease) for row in self.rows]

    def advance(self, runs: Sequence[Run], grid: int) -> None:
        """Move the leases past what was consumed, once that is known."""
        for row, run in zip(self.rows, runs, strict=True):
            if run.path:
                row.lease.advance(len(run.path), grid)


@dataclass(frozen=True, slots=True)
class AcceptPlace:
    """Where one sequence is before its verification, and where its next state goes."""

    state_slot: int
    next_slot: int
    tail_page: int
    position: int

    @classmethod
    def of(cls, lease: SequenceLease) -> AcceptPlace:
        return cls(lease.state_slot, lease.next_slot, lease.tail_page, lease.position)


def accept_plan(places: Sequence[AcceptPlace], runs: Sequence[Run], grid: int) -> AcceptPlan | None:
    """What becomes part of the sequences; None where nothing was consumed."""
    sequences = []
    for number, (place, run) in enumerate(zip(places, runs, strict=True)):
        if not run.path:
            continue
        rows = place.position % grid
        crosses = rows + len(run.path) >= grid
        sequences.append(
            AcceptSequence(
                state_slot=place.state_slot,
                tail_page=place.tail_page,
                tail_rows=rows,
                draft_page=number,
                path=run.path,
                boundary_slot=place.next_slot if crosses else PAD_SLOT,
            )
        )
    return AcceptPlan(grid, tuple(sequences)) if sequences else None
