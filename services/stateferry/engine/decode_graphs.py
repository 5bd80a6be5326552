# mypy: allow-untyped-calls
"""Decode steps captured as CUDA graphs: one launch where a step of Python has hundreds.

A graph is made for a number of rows, and smaller steps run in it with rows that are padding. Its
inputs lie in tables at fixed places (triton_replay), which each step fills. The products of a step
have whole multiples of DENSE_ROWS rows, as they have in a step that is not captured
(linear/triton_ops.py), so both give the same bits.

A step can consume what the one before it chose without anybody having seen it: the likeliest tokens
stay on the device, at a place that all graphs share, and the next replay takes them from there.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from stateferry.engine.arriving import Arriving
from stateferry.engine.sampler import likeliest_rows
from stateferry.models.caches import LayerCaches
from stateferry.models.model import Model
from stateferry_kernels.kv_layer import KvPlan
from stateferry_kernels.linear.triton_ops import ROW_BUCKET as DENSE_ROWS
from stateferry_kernels.plans import CommitPlan, DecodePlan
from stateferry_kernels.triton_replay import ReplayedCommit, ReplayedDecode

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


# Rows of the largest graph: eight bytes of the device for each.
_MOST_ROWS = 4096
_COMMITS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a replay leaves: logits, (num_rows, vocab_size) fp32 on the device, until the next one;
    and ``sampler.likeliest_rows`` of them, for good."""

    logits: torch.Tensor
    likeliest: Arriving


@dataclass(frozen=True, slots=True)
class _CapturedDecode:
    graph: torch.cuda.CUDAGraph
    inputs: ReplayedDecode
    logits: torch.Tensor  # (rows of the graph, vocab_size)
    likeliest: torch.Tensor  # (2, rows of the graph), on the device


@dataclass(frozen=True, slots=True)
class _CapturedCommit:
    graph: torch.cuda.CUDAGraph
    inputs: ReplayedCommit


class DecodeGraphs:
    """The decode steps and commits of one model over the pools of its sequences."""

    def __init__(
        self, model: Model, caches: LayerCaches, *, page_tokens: int, longest: int
    ) -> None:
        """longest: tokens that a sequence has at most. The model runs on the Triton backend."""
        self._model, self._caches = model, caches
        self._page_tokens, self._longest = page_tokens, longest
        self._decodes: dict[int, _CapturedDecode] = {}
        self._commits: dict[int, deque[_CapturedCommit]] = {}
        # Graphs of one pool overwrite each other's memory. Commits run while a step's logits are
        # still wanted, so they have a pool of their own.
        self._decode_pool = torch.cuda.graph_pool_handle()
        self._commit_pool = torch.cuda.graph_pool_handle()
        # The ids that the last replay found likeliest, row by row.
        device = caches.states[0].ssm_state.device
        self._chosen = torch.zeros(_MOST_ROWS, dtype=torch.int64, device=device)
        # Why no step can be captured, once that is known.
        self.refused: str | None = None

    @torch.inference_mode()
    def capture(self, most_rows: int) -> None:
        """Make the graphs for steps of up to ``most_rows`` rows. Waits for the device."""
        began_s = time.perf_counter()
        # The largest first: the others then fit into its memory.
        for rows in reversed(_sizes(most_rows)):
            if self._decode_of(rows) is None:
                return
            for _ in range(_COMMITS_IN_FLIGHT):
                self._commit_of(rows)
        took_s = time.perf_counter() - began_s
        log.info("captured decode steps of up to %d rows in %.1f s", most_rows, took_s)

    def decode(
        self,
        token_ids: Sequence[int],
        sources: Sequence[int],
        plan: DecodePlan,
        kv_plan: KvPlan,
    ) -> Decoded | None:
        """``Model.decode``; None, and nothing done, where that cannot be captured. Rows with a
        source consume what the last ``decode`` found likeliest in its row of that number, the
        others their token id."""
        count = len(token_ids)
        captured = self._decode_of(_size_for(count))
        if captured is None:
            return None
        captured.inputs.fill(token_ids, sources, plan, kv_plan)
        captured.graph.replay()
        return Decoded(captured.logits[:count], Arriving(captured.likeliest[:, :count]))

    def commit(self, plan: CommitPlan) -> None:
        """``Model.commit``."""
        if self.refused is not None:
            self._model.commit(plan, self._caches)
            return
        captured = self._commit_of(_size_for(len(plan.src_slots)))
        captured.inputs.fill(plan)
        captured.graph.replay()

    def _decode_of(self, rows: int) -> _CapturedDecode | None:
        if self.refused is None and rows not in self._decodes and rows <= _MOST_ROWS:
            inputs = ReplayedDecode(
                self._caches.states[0],
                self._caches.kv[0] if self._caches.kv else None,
                page_tokens=self._page_tokens,
                num_rows=rows,
                batch_rows=-(-rows // DENSE_ROWS) * DENSE_ROWS,
                longest=self._longest,
            )

            def step() -> tuple[torch.Tensor, torch.Tensor]:
                token_ids = inputs.consumed(self._chosen)
                logits = self._model.decode(token_ids, inputs.plan, inputs.kv_plan, self._caches)[
                    :rows
                ]
                likeliest = likeliest_rows(logits)
                self._chosen[:rows] = likeliest[0]
                return logits, likeliest

            self.refused = _waits_for_the_device(step)
            if self.refused is not None:
                log.warning("decode steps are not captured as CUDA graphs: %s", self.refused)
                return None
            graph, (logits, likeliest) = _captured(step, self._decode_pool)
            self._decodes[rows] = _CapturedDecode(graph, inputs, logits, likeliest)
        return self._decodes.get(rows)

    def _commit_of(self, rows: int) -> _CapturedCommit:
        """In turns: the tables of one may be on their way behind a step that still runs, and nobody
        should wait for that before the next is queued."""
        made = self._commits.setdefault(rows, deque())
        if len(made) < _COMMITS_IN_FLIGHT:
            made.append(self._capture_commit(rows))
        made.rotate()
        return made[0]

    def _capture_commit(self, rows: int) -> _CapturedCommit:
        inputs = ReplayedCommit(self._caches.states[0], rows)

        def step() -> None:
            self._model.commit(inputs.plan, self._caches)

        step()
        graph, _ = _captured(step, self._commit_pool)
        return _CapturedCommit(graph, inputs)


def _captured(step: Callable[[], _Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, _Result]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        result = step()
    return graph, result


def _waits_for_the_device(step: Callable[[], object]) -> str | None:
    """Why the step cannot be captured: what it says when it is forbidden to wait."""
    # The first time it compiles kernels and builds tables, and may.
    step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return f"a layer waits for the device ({error})"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def _size_for(rows: int) -> int:
    """Rows of the graph that a step of so many takes: a power of two, then multiples of
    DENSE_ROWS."""
    if rows > DENSE_ROWS:
        return -(-rows // DENSE_ROWS) * DENSE_ROWS
    return 1 << (rows - 1).bit_length()


def _sizes(most_rows: int) -> list[int]:
    return sorted({_size_for(rows) for rows in range(1, most_rows + 1)})
