"""The kernel benchmark runs, compares results before times, and reports every key. No time is
asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.kernels import bench_linear, measure, repeated, report
from bench.kernels.measure import Local, Mismatch, Times, expect_same, interleave, relative_error
from bench.kernels.rows import OURS
from bench.kernels.suite import Outcome, run_suite
from bench.kernels.vllm_link import VLLM
from bench.kernels.workload import Shape, tiny
from stateferry_kernels.native.library import NativeUnavailable, native

RATIOS_BY_BATCH = ("state_update_vs_stream", "state_update_vs_torch", "decode_row_vs_step")


@pytest.fixture(scope="module")
def outcome() -> Iterator[Outcome]:
    try:
        native()
    except NativeUnavailable as error:
        pytest.skip(f"the benchmark is of the cpu backend: {error}")
    threads = torch.get_num_threads()
    yield run_suite(tiny(seed=3), None, lambda rows: None)
    torch.set_num_threads(threads)


def test_every_row_is_measured(outcome: Outcome) -> None:
    measured = [row for row in outcome.rows if row.contender != VLLM]
    assert {row.operation for row in measured} == {
        *("ceiling", "state_step", "decode_row", "chunk_scan", "linear", "verify"),
        *("conv1d_extend", "conv1d_row", "gated_rms_norm"),
    }
    for row in measured:
        assert row.seconds and row.best_seconds and row.rate, row
        assert 0 < row.best_seconds <= row.seconds and math.isfinite(row.rate), row
    peers = [row for row in measured if not row.contender.startswith(OURS)]
    assert len(peers) > len(measured) / 3


def test_a_peer_that_is_not_installed_is_said_to_be(outcome: Outcome) -> None:
    rows = [row for row in outcome.rows if row.contender == VLLM]
    assert {row.operation for row in rows} == {"state_step", "chunk_scan"}
    assert all(row.seconds is None for row in rows)
    assert outcome.result["vllm"] == "not installed"


def test_the_result_line_has_every_ratio(outcome: Outcome) -> None:
    line = report.result_line(outcome.result)
    result = json.loads(line.removeprefix("RESULT "))
    for key in RATIOS_BY_BATCH:
        assert set(result[key]) == {"1", "2"}
        assert all(ratio > 0 for ratio in result[key].values())
    assert result["chunk_scan_vs_matmul"] > 0 and result["chunk_scan_vs_torch"] > 0
    names = {f"{dtype}_m{rows}" for dtype in ("fp32", "bf16") for rows in (1, 8)}
    assert set(result["skinny_linear_vs_torch"]) == names
    assert result["chunk_scan_vs_vllm"] is None and result["state_update_vs_vllm"] is None


def test_the_plot_is_written(outcome: Outcome, tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="drawn with the extra `bench`, which tests do not need"
    )
    from bench.kernels.plot import plot

    path = tmp_path / "new" / "plot.png"
    plot(outcome.rows, "a caption", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_little(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) * (1 + 1e-4)

    kernels = replace(bench_linear.select_kernels("torch"), linear=off_by_little)
    monkeypatch.setattr(bench_linear, "select_kernels", lambda name: kernels)
    monkeypatch.setattr(bench_linear, "interleave", lambda *_: pytest.fail("was timed"))
    with pytest.raises(Mismatch, match="linear"):
        bench_linear.bench_linear(tiny(seed=0))


def test_nan_is_a_mismatch() -> None:
    good = torch.ones(3)
    with pytest.raises(Mismatch):
        expect_same("out", good, torch.tensor([1.0, 1.0, math.nan]))
    assert relative_error(good, good) == 0


class Recorder:
    """Takes no time, says how long it took."""

    def __init__(self, name: str, seconds: float, period: int, log: list[tuple[str, int]]) -> None:
        self.name, self.seconds, self.period, self._log = name, seconds, period, log

    def sample(self, calls: int) -> float:
        self._log.append((self.name, calls))
        return self.seconds


def says_itself(contender: Recorder, calls: int) -> float:
    return contender.sample(calls)


def test_contenders_take_turns_in_alternating_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "_wall_s", says_itself)
    log: list[tuple[str, int]] = []
    # One that is through its buffers in a moment, one that takes long for each.
    contenders = {"a": Recorder("a", 1e-3, 3, log), "b": Recorder("b", 0.04, 24, log)}
    times = interleave(contenders, rounds=2, sample_s=0.01, group_s=math.inf)
    calibration = [("a", 1), ("a", 1), ("a", 3), ("b", 1), ("b", 1)]
    # ``a`` warms up, and whole passes fill its sample; ``b`` sees a part of its buffers.
    first, second = [("a", 3), ("a", 12)], [("b", 3)]
    assert log == [*calibration, *first, *second, *second, *first]
    assert times.seconds == {"a": [1e-3] * 2, "b": [0.04] * 2}


def test_slow_contenders_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_wall_s", says_itself)
    log: list[tuple[str, int]] = []
    times = interleave({"a": Recorder("a", 1.0, 1, log)}, rounds=9, sample_s=0.0, group_s=5.0)
    assert len(times.seconds["a"]) == 5


def test_a_contender_rotates_through_its_buffers() -> None:
    seen: list[int] = []
    assert Local(seen.append, period=3).sample(7) > 0
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_speedup_is_the_median_of_the_rounds_ratios() -> None:
    # One disturbed round: the ratio of medians would be 3, that of the undisturbed rounds is 2.
    times = Times({"a": [1.0, 2.0, 4.0], "b": [2.0, 20.0, 8.0]})
    assert times.speedup("a", over="b") == 2.0
    assert times.fastest(["a", "b"]) == "a"


def test_scan_flops_count_each_pair_once() -> None:
    shape = Shape(nheads=2, headdim=3, dstate=5, ngroups=1, grid=4)
    assert shape.scan_flops(1) == 4 * 5 * 6 + 4 * 6 + 4 * 5
    assert shape.scan_flops_dense(1) == 4 * 5 * 6 + 2 * (4 * 6 + 4 * 5)


def test_medians_over_processes() -> None:
    results: list[dict[str, object]] = [
        {"a": {"1": value, "2": 2 * value}, "who": "x", "b": None} for value in (3.0, 1.0, 2.0)
    ]
    assert repeated.medians(results) == {"a": {"1": 2.0, "2": 4.0}, "who": "x", "b": None}


def test_a_process_without_a_result_is_an_error() -> None:
    with pytest.raises(repeated.ProcessFailed):
        repeated.run_processes(["--no-such-option"], 1)
