"""The plain state update against the stream, torch and vLLM."""

from __future__ import annotations

from typing import Any

import torch

from bench.kernels import torch_peers
from bench.kernels.ceilings import STREAM, stream
from bench.kernels.inputs import FP32, Source
from bench.kernels.measure import Contender, Local, expect_same, interleave
from bench.kernels.rows import OURS, Row, absent, name_of, rows_of
from bench.kernels.vllm_link import VLLM, VllmLink
from bench.kernels.workload import Workload
from stateferry_kernels.dispatch import select_kernels
from stateferry_kernels.layer_state import SsmLayerParams

TORCH_BACKEND = "torch backend"
TORCH_DIRECT = "torch mul_ addcmul_ bmm"


def bench_step(w: Workload, vllm: VllmLink | None) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and the ratios of fp32 by batch."""
    rows: list[Row] = []
    found: dict[str, Any] = {"vs_stream": {}, "vs_torch": {}, "vs_vllm": {}}
    for dtype, state_dtype in w.decode_dtypes:
        for batch in w.batches:
            case_rows, ratios = _case(w, vllm, batch, dtype, state_dtype)
            rows += case_rows
            if dtype == FP32:
                for name, ratio in ratios.items():
                    found[name][str(batch)] = ratio
    return rows, found


def _case(
    w: Workload, vllm: VllmLink | None, batch: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> tuple[list[Row], dict[str, float]]:
    source = Source(w.shape, w.seed)
    params, tokens = source.params(), source.tokens(batch, dtype=dtype)
    s = w.shape
    state_bytes = batch * s.state_bytes(state_dtype)
    layers = w.layers_of(w.decode_bytes(batch), share=1.0 if dtype == FP32 else 0.25)
    first = source.normal(batch + 1, s.nheads, s.headdim, s.dstate, dtype=state_dtype)
    # As the state pool lays them out: slot by slot, all layers of one beside each other.
    slots_by_layer = first.unsqueeze(1).repeat(1, layers, 1, 1, 1)
    pools = list(slots_by_layer.unbind(1))
    slots = torch.arange(1, batch + 1, dtype=torch.int32)
    out = torch.empty_like(tokens["x"])

    def entry(step: Any) -> Local:
        return Local(
            lambda i: step(pools[i], **tokens, params=params, state_slots=slots, out=out), layers
        )

    contenders: dict[str, Contender] = {
        OURS: entry(select_kernels("cpu").state_step),
        TORCH_BACKEND: entry(select_kernels("torch").state_step),
    }
    firsts = {OURS: pools[0], TORCH_BACKEND: pools[0]}
    if state_dtype == FP32:
        # It has no slots: each layer's states in one piece suit it best.
        pieces = [first.clone() for _ in range(layers)]
        contenders[TORCH_DIRECT] = Local(
            lambda i: torch_peers.state_step(pieces[i][1:], **tokens, params=params, out=out),
            layers,
        )
        firsts[TORCH_DIRECT] = pieces[0]
    expected = _first_result(contenders[OURS], firsts[OURS], first, out)
    for name in (TORCH_BACKEND, TORCH_DIRECT):
        if name in contenders:
            _expect(name, expected, _first_result(contenders[name], firsts[name], first, out))
    contenders[STREAM] = stream(layers * state_bytes)
    if vllm:
        case = _vllm_case(tokens, params, first, layers)
        contenders[VLLM], result = vllm.contender(case)
        _expect(VLLM, expected, (result["out"], result["state"][1:]))

    times = interleave(contenders, w.rounds, w.sample_s, w.group_s)
    work = dict.fromkeys(contenders, 2e-9 * state_bytes)
    work[STREAM] = 2e-9 * state_bytes * layers
    rows = rows_of("state_step", f"batch {batch}", name_of(dtype, state_dtype), times, work, "GB/s")
    rows = [_per_layer(row, layers) if row.contender == STREAM else row for row in rows]
    if not vllm:
        rows.append(absent("state_step", f"batch {batch}", name_of(dtype, state_dtype), VLLM))
    torch_names = [name for name in (TORCH_BACKEND, TORCH_DIRECT) if name in contenders]
    ratios = {
        "vs_stream": times.speedup(OURS, STREAM) / layers,
        "vs_torch": times.speedup(OURS, times.fastest(torch_names)),
    }
    if vllm:
        ratios["vs_vllm"] = times.speedup(OURS, VLLM)
    return rows, ratios


def _first_result(
    contender: Contender, pool: torch.Tensor, before: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and states (num_seqs, ..) after one call on the first layer."""
    assert isinstance(contender, Local)
    pool.copy_(before)
    contender.call(0)
    return out.clone(), pool[1:].clone()


def _expect(name: str, ours: Any, theirs: Any) -> None:
    expect_same(f"state_step, out of {name}", ours[0], theirs[0])
    expect_same(f"state_step, state of {name}", ours[1], theirs[1])


def _vllm_case(
    tokens: dict[str, torch.Tensor], params: SsmLayerParams, pool: torch.Tensor, layers: int
) -> dict[str, Any]:
    values = {"A": params.A, "D": params.D, "dt_bias": params.dt_bias}
    return {"operation": "step", "layers": layers, "state": pool, **tokens, **values}


def _per_layer(row: Row, layers: int) -> Row:
    """The stream passes over all layers in one call."""
    assert row.seconds is not None and row.best_seconds is not None and row.speedup is not None
    return Row(
        **{
            **vars(row),
            "seconds": row.seconds / layers,
            "best_seconds": row.best_seconds / layers,
            "speedup": row.speedup / layers,
        }
    )
