"""Where an engine runs, and on which kernels."""

from __future__ import annotations

from typing import Literal

import torch

from stateferry.config import WorkerSection
from stateferry.core.errors import ConfigError
from stateferry_kernels.dispatch import BackendUnavailable, select_kernels
from stateferry_kernels.operations import Kernels

_GPU_BACKEND = "triton"
DEVICES = ("auto", "cpu", "cuda")
DECODE_GRAPHS = ("auto", "off")
OVERLAP = ("auto", "on", "off")


def pick_device(worker: WorkerSection) -> tuple[torch.device, Kernels]:
    """The device and the kernel backend that the settings ask for. Raises ConfigError naming the
    setting that cannot be had here."""
    if worker.device not in DEVICES:
        raise ConfigError("worker.device", f"{worker.device!r} is none of {', '.join(DEVICES)}")
    if worker.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("worker.device", "this process sees no CUDA device")
    wants_gpu = worker.device == "cuda" or (worker.device == "auto" and _gpu_serves(worker.kernels))
    device = torch.device("cuda" if wants_gpu else "cpu")
    try:
        kernels = select_kernels(None if worker.kernels == "auto" else worker.kernels, device)
    except (ValueError, BackendUnavailable) as error:
        raise ConfigError("worker.kernels", str(error)) from error
    if wants_gpu and kernels.name == "cpu":
        raise ConfigError("worker.kernels", "the cpu backend cannot serve worker.device = cuda")
    return device, kernels


def wants_graphs(worker: WorkerSection, device: torch.device, kernels: Kernels) -> bool:
    """Whether decode steps are to be captured as CUDA graphs. Raises ConfigError."""
    if worker.decode_graphs not in DECODE_GRAPHS:
        raise ConfigError(
            "worker.decode_graphs",
            f"{worker.decode_graphs!r} is none of {', '.join(DECODE_GRAPHS)}",
        )
    can = device.type == "cuda" and kernels.name == _GPU_BACKEND
    return can and worker.decode_graphs == "auto"


def steps_in_flight(worker: WorkerSection, device: torch.device) -> Literal[1, 2]:
    """How many steps may have been planned and not come back: 2 where they overlap. Raises
    ConfigError."""
    if worker.overlap not in OVERLAP:
        raise ConfigError("worker.overlap", f"{worker.overlap!r} is none of {', '.join(OVERLAP)}")
    overlaps = worker.overlap == "on" or (worker.overlap == "auto" and device.type == "cuda")
    return 2 if overlaps else 1


def _gpu_serves(kernels: str) -> bool:
    """Whether ``auto`` means the GPU: there is one, and nothing else but Triton was asked for."""
    if kernels not in ("auto", _GPU_BACKEND) or not torch.cuda.is_available():
        return False
    try:
        select_kernels(_GPU_BACKEND)
    except BackendUnavailable:
        return False
    return True
