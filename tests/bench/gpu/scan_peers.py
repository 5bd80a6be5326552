"""The peers' chunk scans, as their engines call them, on the workload that ours runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.peers import Peers

Run = Callable[[], torch.Tensor]


def scan_peers(
    peers: Peers, inputs: dict[str, Any], lengths: list[int], chunk: int, state_dtype: torch.dtype
) -> dict[str, Run]:
    """A call by peer that returns y (total_tokens, nheads, headdim). inputs: x, dt, B, C, z, A, D,
    dt_bias as ours takes them; chunk: the model's own chunk_size."""
    makers = {"mamba_ssm": _mamba_ssm, "vllm": _vllm, "sglang": _sglang}
    runs = {}
    for name, make in makers.items():
        run = make(peers, inputs, lengths, chunk, state_dtype)
        if run is not None:
            runs[name] = run
    return runs


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _batched(inputs: dict[str, Any]) -> dict[str, Any]:
    per_token = ("x", "dt", "B", "C", "z")
    return {
        name: value[None] if name in per_token and value is not None else value
        for name, value in inputs.items()
    }


def _mamba_ssm(
    peers: Peers, inputs: dict[str, Any], lengths: list[int], chunk: int, state_dtype: torch.dtype
) -> Run | None:
    function = peers.function("mamba_ssm.ssd_combined.mamba_chunk_scan_combined")
    if function is None:
        return None
    batch = _batched(inputs)
    packed: dict[str, Any] = {}
    if len(lengths) > 1:
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        packed = {
            "seq_idx": sequences[None].int().cuda(),
            "cu_seqlens": _offsets(lengths).cuda(),
            "return_varlen_states": True,
        }

    @torch.no_grad()
    def run() -> torch.Tensor:
        y, *_ = function(
            **batch, chunk_size=chunk, dt_softplus=True, return_final_states=True, **packed
        )
        return y[0]

    return run


def _vllm(
    peers: Peers, inputs: dict[str, Any], lengths: list[int], chunk: int, state_dtype: torch.dtype
) -> Run | None:
    function = peers.function("vllm.ssd_combined.mamba_chunk_scan_combined_varlen")
    if function is None:
        return None
    edges, last_chunks, sequence_of_chunk = [0], [], []
    for number, length in enumerate(lengths):
        begin = edges[-1]
        ends = [*range(begin + chunk, begin + length, chunk), begin + length]
        edges += ends
        sequence_of_chunk += [number] * len(ends)
        last_chunks.append(len(edges) - 2)
    tables = {
        "cu_seqlens": _offsets(lengths).cuda(),
        "cu_chunk_seqlens": torch.tensor(edges, dtype=torch.int32).cuda(),
        "last_chunk_indices": torch.tensor(last_chunks, dtype=torch.int32).cuda(),
        "seq_idx": torch.tensor(sequence_of_chunk, dtype=torch.int32).cuda(),
    }
    out = torch.empty_like(inputs["x"], memory_format=torch.contiguous_format)

    @torch.no_grad()
    def run() -> torch.Tensor:
        function(
            **inputs,
            chunk_size=chunk,
            out=out,
            dt_softplus=True,
            state_dtype=state_dtype,
            **tables,
        )
        return out

    return run


def _sglang(
    peers: Peers, inputs: dict[str, Any], lengths: list[int], chunk: int, state_dtype: torch.dtype
) -> Run | None:
    function = peers.function("sglang.ssd_combined.mamba_chunk_scan_combined")
    if function is None:
        return None
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tables = {"seq_idx": sequences[None].int().cuda(), "cu_seqlens": _offsets(lengths).cuda()}
    batch = _batched(inputs)
    out = torch.empty_like(batch["x"], memory_format=torch.contiguous_format)

    @torch.no_grad()
    def run() -> torch.Tensor:
        function(
            **batch,
            chunk_size=chunk,
            out=out,
            dt_softplus=True,
            state_dtype=state_dtype,
            return_final_states=False,
            return_varlen_states=True,
            **tables,
        )
        return out[0]

    return run
