"""The transfer benchmark moves right bytes by every arm and reports every key. No time is
asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.transfer.__main__ import result_of
from bench.transfer.arms import ARMS, GRPC, OURS, SHM, UCX, peer
from bench.transfer.hidden import Timeline, measure_hidden
from bench.transfer.measure import MB, ShapeResult, SizeResult, measure_sizes
from bench.transfer.shapes import SHAPES, segments_in
from stateferry.bundled import bundled_model_dir


@pytest.mark.ucx
async def test_every_arm_moves_the_bytes() -> None:
    pytest.importorskip("ucxx")
    shown: list[SizeResult] = []
    async with peer(2 * MB) as other:
        for arm in (UCX, SHM):
            other.memory[:] = len(arm)
            await other.send(arm, MB)
            # The other half is as it was.
            assert await other.sum_there(2 * MB) == (len(arm) + 1) * MB
        [result] = await measure_sizes(other, (1,), 1, shown.append)
        assert (await other.send(OURS, MB)).cpu_s > 0
    assert shown == [result] and set(result.gbps) == set(ARMS)
    assert all(rate > 0 for rate in result.gbps.values())


def test_sizes_of_public_models() -> None:
    by_name = {shape.name: shape for shape in SHAPES}
    mamba2 = by_name["Mamba2-2.7B"]
    assert mamba2.total_bytes(1024) == mamba2.total_bytes(65536) == 64 * (2621440 + 5376 * 6)
    nemotron = by_name["Nemotron-Nano-9B-v2"]
    assert nemotron.total_bytes(8192) - nemotron.total_bytes(0) == 8192 * 4 * 4096
    falcon = by_name["Falcon-H1-7B"]
    assert falcon.total_bytes(1024) - falcon.total_bytes(0) == 1024 * 44 * 1024
    for shape in SHAPES:
        whole = shape.segment_sizes(1000, 1 << 40)
        assert sum(size for _, _, size in whole) == shape.total_bytes(1000)
        cut = shape.segment_sizes(65536, 320 * MB)
        assert sum(size for _, _, size in cut) <= 320 * MB and all(size > 0 for _, _, size in cut)
    sizes = mamba2.segment_sizes(0, 1 << 40)
    segments = segments_in(np.zeros(mamba2.total_bytes(0), dtype=np.uint8), sizes)
    assert [segment.size_bytes for segment in segments] == [size for _, _, size in sizes]


async def test_hidden_share_is_measured_in_the_real_servicer() -> None:
    timeline = await measure_hidden(bundled_model_dir(), prompt_len=300, requests=2)
    assert len(timeline.handing_off) >= 2 and len(timeline.computing) >= 4
    assert 0.0 <= timeline.hidden_share() <= 1.0


def test_hidden_share() -> None:
    assert Timeline([(0.0, 2.0)], [(2.0, 3.0)]).hidden_share() == 0.0
    assert Timeline([(0.0, 1.0), (2.0, 3.0)], [(0.5, 2.5)]).hidden_share() == 0.5


def test_every_key_is_reported(tmp_path: Path) -> None:
    sizes = [SizeResult(64, dict.fromkeys(ARMS, 2.0), 0.9, 6.0, 0.1)]
    shapes = [ShapeResult("model", 1024, 2 * MB, MB, 0.5, 0.1)]
    timeline = Timeline([(0.0, 2.0)], [(1.0, 3.0)])
    result = result_of(sizes, shapes, timeline)
    assert result["gbps_64mb_vs_ucx"] == 0.9 and result["gbps_64mb_vs_grpc"] == 6.0
    assert result["hidden_share"] == 0.5
    assert result["migration_32k_vs_1k"] is None and result["migration_vs_reprefill"] is None
    assert GRPC in str(result["gbps"]) and "KV cut" in shapes[0].note
    pytest.importorskip("matplotlib")
    from bench.transfer.plot import plot

    plot(sizes, shapes, timeline, "title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
