"""The kernels that the parity entries are tested on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stateferry_kernels.dispatch import Kernels, select_kernels

BACKENDS = ("torch", "cpu")


def kernels_or_skip(name: str) -> Kernels:
    """Skips the test with the reason when there is no such backend here."""
    if name == "cpu":
        from stateferry_kernels.conv1d import cpu_ops as c
        from stateferry_kernels.ssd import cpu_ops as s
        from stateferry_kernels.state_update import cpu_ops as u
        from stateferry_kernels.state_update import step_cpu as t
        return replace(select_kernels("torch"), name="cpu", chunk_scan=s.chunk_scan, commit=u.commit, state_step=t.state_step, state_steps=t.state_steps, causal_conv1d_extend=c.causal_conv1d_extend)
    from stateferry_kernels.state_update import step_torch as t
    return replace(select_kernels(name), state_step=t.state_step, state_steps=t.state_steps)
