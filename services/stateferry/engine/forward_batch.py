"""What one forward pass works on. An extend and a decode are different things, so are their
batches.

A batch is planned, which moves its leases, and then launched, maybe while the one before still
runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stateferry.cache.lease import SequenceLease
from stateferry.core.errors import InvariantViolation
from stateferry.core.sampling import SamplingParams
from stateferry.engine.launch import Started
from stateferry.engine.prompt_scores import PromptScores
from stateferry.engine.rules import SequenceRules
from stateferry_kernels.kv_layer import KvPlan, KvSequence
from stateferry_kernels.layer_state import PAD_SLOT
from stateferry_kernels.plans import (
    BoundaryWrite,
    CommitPlan,
    DecodePlan,
    ExtendPlan,
    ExtendSequence,
)


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to choose output token ``index`` of one request. ``banned_ids`` cannot be chosen;
    ``rules`` is None for most requests."""

    params: SamplingParams
    index: int
    banned_ids: frozenset[int] = frozenset()
    rules: SequenceRules | None = None


@dataclass(slots=True)
class PendingToken:
    """What a planned launch will sample for one row. Whoever consumes it is launched later; if no
    token came of it, nobody wants what follows from it, and any id will do.

    ``source`` is the launch while it may be running on a device, where the token lies at ``row``.
    """

    token_id: int = 0
    source: Started | None = None
    row: int = 0

    def known(self) -> int:
        """The token; waits for the launch that samples it."""
        source = self.source
        if source is not None:
            source.sampled()
        return self.token_id

    def come_out(self, token_id: int) -> None:
        """The launch has sampled it. Mutates; on any thread."""
        self.token_id = token_id
        self.source = None


@dataclass(frozen=True, slots=True)
class ExtendRow:
    """A run of prompt tokens of one sequence. ``sample`` is set when token 0 follows from it,
    ``scores`` when the client wants log-probabilities of the prompt. Without tokens token 0 follows
    from what the lease has as ``final``."""

    lease: SequenceLease
    token_ids: tuple[int, ...]
    sample: SampleSpec | None
    scores: PromptScores | None = None


@dataclass(frozen=True, slots=True)
class ExtendBatch:
    """Prompt tokens of any number of sequences."""

    rows: tuple[ExtendRow, ...]

    @property
    def computed(self) -> tuple[ExtendRow, ...]:
        """The rows that need a forward."""
        return tuple(row for row in self.rows if row.token_ids)

    def plan(self, grid: int) -> ExtendPlan:
        """Where each computed sequence reads and writes."""
        sequences = []
        for row in self.computed:
            lease, length = row.lease, len(row.token_ids)
            boundaries = tuple(BoundaryWrite(*write) for write in lease.writes(length, grid))
            sequences.append(
                ExtendSequence(
                    start=lease.position,
                    length=length,
                    state_slot=lease.state_slot,
                    tail_page=lease.tail_page,
                    boundaries=boundaries,
                )
            )
        return ExtendPlan(grid, tuple(sequences))

    def kv_plan(self, page_tokens: int) -> KvPlan:
        """Where the same rows' keys and values go."""
        return KvPlan(
            page_tokens,
            tuple(
                KvSequence(row.lease.position, len(row.token_ids), row.lease.kv_pages)
                for row in self.computed
            ),
        )

    def advance(self, grid: int) -> None:
        """Move the leases past what was computed."""
        for row in self.computed:
            row.lease.advance(len(row.token_ids), grid)


@dataclass(frozen=True, slots=True)
class DecodeInput:
    """One sequence's next token to consume, and what it samples."""

    lease: SequenceLease
    token_id: int | PendingToken
    sample: SampleSpec
    sampled: PendingToken = field(default_factory=PendingToken)


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One token of any number of sequences."""

    rows: tuple[DecodeInput, ...]

    def sources(self, ahead: Started | None) -> list[int]:
        """Of each row that consumes what the launch ``ahead`` samples, its row there; of others
        -1."""
        ids = (row.token_id for row in self.rows)
        return [
            i.row if isinstance(i, PendingToken) and i.source is ahead is not None else -1
            for i in ids
        ]

    def token_ids(self, sources: Sequence[int] | None = None) -> list[int]:
        """One per row, 0 of those with a source. Waits for the launches that sample the rest, all
        of which have been started."""
        known = []
        for row, source in zip(self.rows, sources or [-1] * len(self.rows), strict=True):
            token = row.token_id
            if isinstance(token, PendingToken):
                token = token.known() if source < 0 else 0
            known.append(token)
        return known

    def plan(self, grid: int) -> DecodePlan:
        leases = [row.lease for row in self.rows]
        if any(lease.state_slot == PAD_SLOT for lease in leases):
            raise InvariantViolation("a lease points at PAD_SLOT")
        return DecodePlan(
            grid=grid,
            state_slots=tuple(lease.state_slot for lease in leases),
            tail_pages=tuple(lease.tail_page for lease in leases),
            tail_rows=tuple(lease.position % grid for lease in leases),
        )

    def kv_plan(self, page_tokens: int) -> KvPlan:
        """Where the same rows' keys and values go."""
        leases = [row.lease for row in self.rows]
        return KvPlan(
            page_tokens,
            tuple(KvSequence(lease.position, 1, lease.kv_pages) for lease in leases),
        )

    def commit_plan(self, grid: int) -> CommitPlan | None:
        """The commits that are due after this step: sequences whose tail it fills."""
        due = [row.lease for row in self.rows if (row.lease.position + 1) % grid == 0]
        if not due:
            return None
        return CommitPlan(
            grid=grid,
            src_slots=tuple(lease.state_slot for lease in due),
            dst_slots=tuple(lease.next_slot for lease in due),
            tail_pages=tuple(lease.tail_page for lease in due),
        )

    def advance(self, grid: int) -> None:
        """Move the leases past the consumed token."""
        for row in self.rows:
            row.lease.advance(1, grid)
