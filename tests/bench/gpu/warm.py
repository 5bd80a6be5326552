"""Compiles what the benchmark will run, one process for each peer and model, and one for ours and
the steps: peers' tuners try dozens of tiles, each a compilation of seconds, which lands in Triton's
cache on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.bench_rows import bench_decode, bench_verify
from bench.gpu.bench_scan import bench_snapshots
from bench.gpu.peers import Peers, load
from bench.gpu.rows import OURS
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
        for peer in (OURS, *PEERS)
    ]


def _warm(peers: Peers, shape_name: str, peer: str) -> None:
    shape = next(shape for shape in SHAPES if shape.name == shape_name)
    if peer == OURS:
        for dtype in (torch.float32, torch.bfloat16):
            bench_decode(shape, 8, dtype, peers, 1.0)
            for grid in (64, 128):
                bench_snapshots(shape, grid, dtype)
        bench_verify(shape, 4, peers)
        return
    for lengths in ([2048], [1024, 1000]):
        inputs = make_inputs(shape, sum(lengths)).named()
        runs = scan_peers(peers, inputs, lengths, shape.chunk, torch.float32)
        if peer in runs:
            runs[peer]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    _warm(load(Path(sys.argv[1])), sys.argv[2], sys.argv[3])
