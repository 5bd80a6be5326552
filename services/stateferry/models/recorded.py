"""Decode steps and verifications that were recorded: a model's layers run in Python once for each
number of rows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from stateferry.models.caches import LayerCaches
from stateferry.models.layers.rotary import BLOCK
from stateferry.models.step import Step
from stateferry_kernels.draft_plans import VerifyPlan
from stateferry_kernels.kv_layer import KvPlan
from stateferry_kernels.operations import Kernels, StepPlan, Tape
from stateferry_kernels.plans import DecodePlan

# The last block's output, and the residual that it is yet to be added to.
Stacked = tuple[torch.Tensor, torch.Tensor]
Stack = Callable[[torch.Tensor, Step], Stacked]
# The kind of the step, and its number of rows.
_Size = tuple[type[StepPlan], int]

# With more rows the layers' own work hides what a step costs beside it.
MOST_ROWS = 16
# Of what all tapes keep between their calls.
MOST_BYTES = 64 << 20
# The first step of a size builds what layers build once, and is not recorded.
_RECORDED_AT = (2, 3)


@dataclass(frozen=True, slots=True)
class _Recorded:
    tape: Tape
    residual: torch.Tensor  # what the layers start from, filled in for every step
    positions: torch.Tensor | None  # likewise, where there is attention
    most_positions: int  # that the rotary tables had
    stacked: Stacked


class RecordedSteps:
    """Those of the caches that were used last. A model's only memory; calls may overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._caches: LayerCaches | None = None
        self._steps: OrderedDict[_Size, _Recorded] = OrderedDict()
        self._met: dict[_Size, int] = {}

    def run(
        self,
        stack: Stack,
        kernels: Kernels,
        residual: torch.Tensor,
        plan: StepPlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
    ) -> Stacked:
        """``stack`` over a decode step or a verification: residual (num_rows, d_model). The result
        is valid until the next step."""
        rows = residual.shape[0]
        with self.taken() as free:
            if kernels.recorder is None or rows > MOST_ROWS or not free:
                return stack(residual, _step(kernels, residual, plan, kv_plan, caches))
            if caches is not self._caches:
                self._caches = caches
                self._steps.clear()
                self._met.clear()
            size = (type(plan), rows)
            recorded = self._steps.get(size)
            if recorded is not None and _replay(recorded, residual, plan, kv_plan):
                self._steps.move_to_end(size)
                return recorded.stacked
            return self._first(stack, kernels, residual, plan, kv_plan, caches)

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Whether nobody else is at it; nobody else will be meanwhile."""
        free = self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows of decode steps that there are tapes for, the least recently used
        first."""
        return self._sizes(DecodePlan)

    @property
    def verify_sizes(self) -> tuple[int, ...]:
        """Likewise, of verifications."""
        return self._sizes(VerifyPlan)

    def num_bytes(self, rows: int) -> int:
        """What the tape for a decode step of so many rows keeps between its calls."""
        return self._steps[DecodePlan, rows].tape.num_bytes

    def _sizes(self, kind: type[StepPlan]) -> tuple[int, ...]:
        return tuple(rows for known, rows in self._steps if known is kind)

    def _first(
        self,
        stack: Stack,
        kernels: Kernels,
        residual: torch.Tensor,
        plan: StepPlan,
        kv_plan: KvPlan,
        caches: LayerCaches,
    ) -> Stacked:
        """A step that there is no tape for, or one that it has outgrown."""
        size = (type(plan), residual.shape[0])
        grown = self._steps.pop(size, None) is not None
        met = self._met[size] = 1 if grown else self._met.get(size, 0) + 1
        if met not in _RECORDED_AT or kernels.recorder is None:
            return stack(residual, _step(kernels, residual, plan, kv_plan, caches))
        recorder = kernels.recorder(plan, kv_plan, caches.states, caches.kv, caches.drafts)
        # Tensors that may be filled in under any mode of the caller.
        with torch.inference_mode(False):
            start = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
            step = _step(kernels, start, recorder.plan, recorder.kv_plan, caches)
            positions = step.positions if caches.kv else None
        start.copy_(residual)
        stacked, tape = recorder.record(lambda: stack(start, step))
        if tape is not None:
            most = 0 if positions is None else -(-positions.end // BLOCK) * BLOCK
            at = None if positions is None else positions.rows
            self._steps[size] = _Recorded(tape, start, at, most, stacked)
            while sum(step.tape.num_bytes for step in self._steps.values()) > MOST_BYTES:
                self._steps.popitem(last=False)
        return stacked


def _step(
    kernels: Kernels,
    rows: torch.Tensor,
    plan: StepPlan,
    kv_plan: KvPlan,
    caches: LayerCaches,
) -> Step:
    if isinstance(plan, DecodePlan):
        return Step.decode(kernels, rows, plan, kv_plan, caches)
    return Step.verify(kernels, rows, plan, kv_plan, caches)


def _replay(recorded: _Recorded, residual: torch.Tensor, plan: StepPlan, kv_plan: KvPlan) -> bool:
    """Run it again; False where a sequence is longer than its rotary tables."""
    if recorded.positions is not None:
        positions = kv_plan.positions
        if max(positions) >= recorded.most_positions:
            return False
        recorded.positions.copy_(torch.tensor(positions))
    recorded.residual.copy_(residual)
    recorded.tape.replay(plan, kv_plan)
    return True
