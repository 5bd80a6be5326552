"""Decode in grid form, commits included, against the plain step."""

from __future__ import annotations

import time

import torch

from bench.kernels.inputs import FP32, Source, clone_layer
from bench.kernels.measure import Local, expect_same, interleave
from bench.kernels.rows import OURS, Row, name_of, rows_of
from bench.kernels.workload import Workload
from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.layer_state import LayerState, SsmLayerParams
from stateferry_kernels.operations import Kernels
from stateferry_kernels.plans import CommitPlan, DecodePlan

STEP = "plain step"
# A round visits one fill of every so many; as many rounds visit them all.
_STRIDE = 8


class GridDecode:
    """``decode_row`` averaged over the fills of a tail, plus one commit per interval."""

    period = 1

    def __init__(
        self,
        kernels: Kernels,
        layers: list[LayerState],
        batch: int,
        tokens: dict[str, torch.Tensor],
        params: SsmLayerParams,
    ) -> None:
        self._kernels, self._layers = kernels, layers
        self._tokens, self._params = tokens, params
        self._out = torch.empty_like(tokens["x"])
        self._grid = layers[0].grid
        slots, pages = tuple(range(1, batch + 1)), tuple(range(batch))
        self._rows = [
            DecodePlan(self._grid, slots, pages, (row,) * batch) for row in range(self._grid)
        ]
        fresh = tuple(slot + batch for slot in slots)
        self._commit = CommitPlan(self._grid, slots, fresh, pages)
        self._turn = 0

    def sample(self, calls: int) -> float:
        """Seconds per token and layer, its share of a commit included; a call visits all
        layers."""
        total = 0.0
        for _ in range(calls):
            fills = range(self._turn * 3 % _STRIDE, self._grid, _STRIDE)
            self._turn += 1
            start = time.perf_counter()
            for fill in fills:
                for layer in self._layers:
                    self.row(fill, layer)
            rows = time.perf_counter()
            for layer in self._layers:
                self._kernels.commit(params=self._params, plan=self._commit, state=layer)
            commits = time.perf_counter() - rows
            total += (rows - start) / len(fills) + commits / self._grid
        return total / (calls * len(self._layers))

    def row(self, fill: int, layer: LayerState) -> torch.Tensor:
        self._kernels.decode_row(
            **self._tokens,
            params=self._params,
            plan=self._rows[fill],
            state=layer,
            out=self._out,
        )
        return self._out


def bench_row(w: Workload) -> tuple[list[Row], dict[str, float]]:
    """The rows, and step time / row time of fp32 by batch."""
    kernels = select_kernels("cpu")
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for dtype, state_dtype in w.decode_dtypes:
        _expect_same_tokens(w, kernels, dtype, state_dtype)
        for batch in w.batches:
            source = Source(w.shape, w.seed)
            params, tokens = source.params(), source.tokens(batch, dtype=dtype)
            count = w.layers_of(w.decode_bytes(batch), share=0.5 if dtype == FP32 else 0.125)
            layers = [source.layer(2 * batch + 1, batch, dtype, state_dtype) for _ in range(count)]
            slots = torch.arange(1, batch + 1, dtype=torch.int32)
            out = torch.empty_like(tokens["x"])
            contenders = {
                OURS: GridDecode(kernels, layers, batch, tokens, params),
                STEP: _step(kernels, layers, tokens, params, slots, out),
            }
            times = interleave(contenders, w.rounds, w.sample_s, w.group_s)
            # Bytes of state: a row reads it, a commit in every interval reads and writes it.
            state = 1e-9 * batch * w.shape.state_bytes(state_dtype)
            work = {OURS: state * (1 + 2 / w.shape.grid), STEP: 2 * state}
            name = name_of(dtype, state_dtype)
            rows += rows_of("decode_row", f"batch {batch}", name, times, work, "GB/s")
            if dtype == FP32:
                ratios[str(batch)] = times.speedup(OURS, STEP)
    return rows, ratios


def _step(
    kernels: Kernels,
    layers: list[LayerState],
    tokens: dict[str, torch.Tensor],
    params: SsmLayerParams,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> Local:
    def call(number: int) -> None:
        state = layers[number].ssm_state
        kernels.state_step(state, **tokens, params=params, state_slots=slots, out=out)

    return Local(call, len(layers))


def _expect_same_tokens(
    w: Workload, kernels: Kernels, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    """An interval of tokens in both forms: outputs, and the state at its end."""
    source = Source(w.shape, w.seed)
    params = source.params()
    layer = source.layer(3, 1, dtype, state_dtype)
    # The plain step would round a bf16 state at every token: keep it in fp32.
    stepped = clone_layer(layer).ssm_state.float()
    slot = torch.tensor([1], dtype=torch.int32)
    in_rows, in_steps = [], []
    for fill in range(w.shape.grid):
        tokens = source.tokens(1, dtype=dtype)
        in_rows.append(GridDecode(kernels, [layer], 1, tokens, params).row(fill, layer))
        out = torch.empty_like(tokens["x"])
        kernels.state_step(stepped, **tokens, params=params, state_slots=slot, out=out)
        in_steps.append(out)
    kernels.commit(params=params, plan=CommitPlan(w.shape.grid, (1,), (2,), (0,)), state=layer)
    expect_same("decode_row against state_step", torch.cat(in_rows), torch.cat(in_steps))
    expect_same("commit against state_step", layer.ssm_state[2], stepped[1].to(state_dtype))
