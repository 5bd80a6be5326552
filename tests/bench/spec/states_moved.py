"""How many states a verification reads and writes, counted where it happens."""

from __future__ import annotations

from collections.abc import Sequence

from bench.spec.duel import Contender
from stateferry.core.request import GenerationRequest
from stateferry_kernels.draft_plans import AcceptPlan, VerifyPlan
from stateferry_kernels.layer_state import PAD_SLOT


class _Counting:
    """A model that counts on the way."""

    def __init__(self, model: object) -> None:
        self._model = model
        self.verifications = 0
        self.moved = 0
        self.rows = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def verify(self, token_ids: object, plan: VerifyPlan, *rest: object) -> object:
        self.verifications += len(plan.sequences)
        self.rows += plan.num_rows
        for sequence in plan.sequences:
            # Once for all rows; a path that passes the grid folds it once more, in scratch.
            passes = sequence.tail_rows + max(map(len, sequence.paths())) > plan.grid
            self.moved += 1 + passes
        return self._model.verify(token_ids, plan, *rest)  # type: ignore[attr-defined]

    def accept(self, plan: AcceptPlan, *rest: object) -> object:
        # Where a path passes a grid point, its state is read, and the next one written.
        self.moved += 2 * sum(s.boundary_slot != PAD_SLOT for s in plan.sequences)
        return self._model.accept(plan, *rest)  # type: ignore[attr-defined]


def states_moved(on: Contender, requests: Sequence[GenerationRequest]) -> tuple[float, float]:
    """(states moved, rows) of a sequence's verification, means over all of these answers, whether
    drafts pay or not. With a state per token, as others keep them, it would be rows + 2 (a read, a
    write of each, and the accepted one's way back)."""
    runner = on.parts.runner
    counting = _Counting(runner._model)
    runner._model = counting  # type: ignore[assignment]
    try:
        on.always_drafting().answer(requests)
    finally:
        runner._model = counting._model  # type: ignore[assignment]
    if not counting.verifications:
        raise RuntimeError("nothing was verified")
    return counting.moved / counting.verifications, counting.rows / counting.verifications
