"""Rotary position embedding: the tables, and which option of a configuration means what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateferry.core.errors import ModelError
from stateferry.models.options import Raw, positive
from stateferry.models.step import Step

# Positions that tables grow by: they end at a multiple of it.
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class RotaryOptions:
    """How far each feature turns per position."""

    rotary_dim: int
    theta: float


def rotary_options(raw: Raw, head_dim: int, default_share: float = 1.0) -> RotaryOptions:
    """From ``rope_parameters``, or from ``rope_theta`` and ``rope_scaling`` of older files.

    Raises ModelError for any scaling of the frequencies.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelError(f"rope_parameters = {parameters!r} is not an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ModelError(f"rope_type = {kind!r} is not supported; supported: default")
    theta = positive({**raw, **parameters}, "rope_theta", 10_000.0)
    share = positive({**raw, **parameters}, "partial_rotary_factor", default_share)
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ModelError(
            f"partial_rotary_factor = {share!r} turns {rotary_dim} of {head_dim} features; "
            "supported: an even number"
        )
    return RotaryOptions(rotary_dim, theta)


class RotaryTable:
    """cos and sin of every position there has been, one table for all layers of a model."""

    def __init__(self, options: RotaryOptions) -> None:
        powers = torch.arange(0, options.rotary_dim, 2, dtype=torch.float32) / options.rotary_dim
        self._frequencies = 1.0 / options.theta**powers
        self._cos = torch.empty((0, options.rotary_dim // 2))
        self._sin = self._cos

    def rotate(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (num_rows, heads, head_dim) by the positions of the step's rows, as a new tensor."""
        positions = step.positions
        if positions.end > self._cos.shape[0] or self._cos.device != x.device:
            self._grow(positions.end, x.device)
        return step.kernels.rotary(x, cos=self._cos, sin=self._sin, positions=positions.rows)

    def _grow(self, positions: int, device: torch.device) -> None:
        """In blocks of one size, so that a position's bits do not depend on when it was met; at
        least doubling, so that a long sequence does not copy its table for every block."""
        blocks = max(-(-positions // BLOCK), 2 * self._cos.shape[0] // BLOCK)
        angles = [
            torch.arange(n * BLOCK, (n + 1) * BLOCK, dtype=torch.float32)[:, None]
            * self._frequencies
            for n in range(blocks)
        ]
        # The angle is rounded to fp32 as it was in training, its cosine only once.
        self._cos = torch.cat([a.double().cos().float() for a in angles]).to(device)
        self._sin = torch.cat([a.double().sin().float() for a in angles]).to(device)
