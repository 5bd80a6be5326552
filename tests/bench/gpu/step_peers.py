"""The peers' state updates: one token, and several with a state kept for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.peers import Peers
from bench.gpu.workload import Inputs, Shape


def step_peers(
    peers: Peers, shape: Shape, inputs: Inputs, states: torch.Tensor, slots: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """A call by peer; states (num_slots, nheads, headdim, dstate), slots (batch,) int32."""
    wide = _widened(shape, inputs)
    out = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    options: dict[str, Any] = {"dt_softplus": True, "state_batch_indices": slots}
    runs: dict[str, Callable[[], object]] = {}
    function = peers.function("mamba_ssm.selective_state_update.selective_state_update")
    if function is not None:
        runs["mamba_ssm"] = _bound(function, states, wide, options)
    for name in ("vllm", "sglang"):
        function = peers.function(f"{name}.mamba_ssm.selective_state_update")
        if function is not None:
            runs[name] = _bound(function, states, wide, options | {"out": out})
    return runs


def spec_peer(
    peers: Peers,
    shape: Shape,
    inputs: Inputs,
    states: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
) -> Callable[[], object] | None:
    """SGLang's update of several draft tokens that keeps a state for each; kept (batch, steps,
    nheads, headdim, dstate)."""
    function = peers.function("sglang.mamba_ssm.selective_state_update")
    if function is None:
        return None
    steps = kept.shape[1]
    wide = {
        name: value.unflatten(0, (-1, steps)) if name in ("x", "dt", "B", "C") else value
        for name, value in _widened(shape, inputs).items()
    }
    options = {
        "dt_softplus": True,
        "state_batch_indices": slots,
        "out": torch.empty_like(wide["x"], memory_format=torch.contiguous_format),
        "disable_state_update": True,
        "intermediate_states_buffer": kept,
        "cache_steps": steps,
        "intermediate_state_indices": torch.arange(
            len(slots), dtype=torch.int32, device=slots.device
        ),
    }
    return _bound(function, states, wide, options)


def _bound(
    function: Any, states: torch.Tensor, inputs: dict[str, Any], options: dict[str, Any]
) -> Callable[[], object]:
    return lambda: function(states, **inputs, **options)


def _widened(shape: Shape, inputs: Inputs) -> dict[str, Any]:
    """dt, A, D and dt_bias with a stride of 0 over the channels, as their engines pass them."""
    heads, channels = shape.nheads, shape.headdim
    p = inputs.params
    assert p.D is not None and p.dt_bias is not None
    return {
        "x": inputs.x,
        "dt": inputs.dt[..., None].expand(-1, heads, channels),
        "A": p.A[:, None, None].expand(heads, channels, shape.dstate),
        "B": inputs.B,
        "C": inputs.C,
        "D": p.D[:, None].expand(heads, channels),
        "z": None,
        "dt_bias": p.dt_bias[:, None].expand(heads, channels),
    }
