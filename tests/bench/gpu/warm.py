"""Compiles what the benchmark will run, one process for each peer and model: their tuners try
dozens of tiles, each a compilation of seconds, which lands in Triton's cache on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.peers import Peers, load
from bench.gpu.scan_peers import scan_peers
from bench.gpu.workload import SHAPES, make_inputs

PEERS = ("mamba_ssm", "vllm", "sglang")


def start(folder: Path | None) -> list[subprocess.Popen[bytes]]:
    """The processes; none without peers."""
    if folder is None:
        return []
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.gpu.warm", str(folder), shape.name, peer]
        )
        for shape in SHAPES
        for peer in PEERS
    ]


def _warm(peers: Peers, shape_name: str, peer: str) -> None:
    shape = next(shape for shape in SHAPES if shape.name == shape_name)
    for lengths in ([2048], [1024, 1000]):
        inputs = make_inputs(shape, sum(lengths)).named()
        runs = scan_peers(peers, inputs, lengths, shape.chunk, torch.float32)
        if peer in runs:
            runs[peer]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    _warm(load(Path(sys.argv[1])), sys.argv[2], sys.argv[3])
