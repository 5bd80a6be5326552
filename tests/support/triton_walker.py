"""Walks of a layer through the Triton kernels: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from stateferry_kernels.dispatch import select_kernels  # noqa: E402
from stateferry_kernels.operations import Kernels  # noqa: E402
from stateferry_kernels.ssd import triton_ops as ssd_triton  # noqa: E402
from stateferry_kernels.state_update import triton_ops as update_triton  # noqa: E402
from support.ssm_case import Layer, Tokens, Walker, make_tokens  # noqa: E402


def on_device(thing: Any) -> Any:
    """A copy of a dataclass whose tensors, also those of dataclasses in it, are on the device."""
    if isinstance(thing, torch.Tensor):
        # Keeps a pool's stride between slots.
        flat = torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=DEVICE)
        return flat.copy_(thing)
    if hasattr(thing, "__dataclass_fields__"):
        names = [field.name for field in fields(thing) if field.init]
        return replace(thing, **{name: on_device(getattr(thing, name)) for name in names})
    return thing


def triton_kernels(name: str = "torch") -> Kernels:
    """The Triton grid form; the convolution of another backend."""
    return replace(
        select_kernels(name),
        chunk_scan=ssd_triton.chunk_scan,
        decode_row=update_triton.decode_row,
        commit=update_triton.commit,
        verify=update_triton.verify,
        accept=update_triton.accept,
    )


def device_walker(layer: Layer, num_sequences: int = 1) -> Walker:
    walker = Walker(on_device(layer), num_sequences, triton_kernels())
    walker.state, walker.drafts = on_device(walker.state), on_device(walker.drafts)
    return walker


def tokens_of(layer: Layer, length: int, seed: int = 0, with_z: bool = True) -> Tokens:
    return on_device(make_tokens(layer, length, seed=seed, with_z=with_z))
