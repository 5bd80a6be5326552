"""What a worker takes when nobody has said how much, and where it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stateferry.config import TransferSection, WorkerSection
from stateferry.core.errors import ConfigError
from stateferry.worker import memory
from stateferry.worker.device import pick_device
from stateferry.worker.limits import ModelLimits
from stateferry.worker.links import check_handoff_fits
from support.small_cache import GRID, KV, NO_KV, small_cache

CPU = torch.device("cpu")


def test_automatic_is_a_share_of_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", limit)
    whole = memory.automatic_budget_bytes(CPU, 1)
    assert whole > 1 << 28
    for text, expected in (("max\n", whole), (str(1 << 60), whole), ("400000000\n", 200_000_000)):
        limit.write_text(text)
        assert memory.automatic_budget_bytes(CPU, 1) == expected
        assert memory.automatic_budget_bytes(CPU, 4) == expected // 4


def test_a_device_that_is_not_there_is_a_setting_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"worker\.device: 'tpu'"):
        pick_device(WorkerSection(device="tpu"))
    with pytest.raises(ConfigError, match=r"worker\.device: .*CUDA"):
        pick_device(WorkerSection(device="cuda"))
    with pytest.raises(ConfigError, match=r"worker\.kernels"):
        pick_device(WorkerSection(kernels="abacus"))
    for device in ("auto", "cpu"):
        assert pick_device(WorkerSection(device=device, kernels="torch"))[0] == CPU


def test_auto_takes_a_gpu_only_if_triton_may_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kernels in ("cpu", "torch", "reference"):
        device, chosen = pick_device(WorkerSection(kernels=kernels))
        assert device == CPU and chosen.name == kernels
    with pytest.raises(ConfigError, match=r"worker\.kernels"):
        pick_device(WorkerSection(device="cuda", kernels="cpu"))


def test_the_longest_handoff_must_fit_in_staging() -> None:
    limits = ModelLimits(vocab_size=9, max_context_tokens=4 * GRID)
    for kv in (NO_KV, KV):
        pools = small_cache(kv=kv).pools
        needed = pools.max_sequence_bytes(4 * GRID)
        check_handoff_fits(pools, limits, TransferSection(staging_bytes=needed))
        with pytest.raises(ConfigError, match=r"transfer\.staging_bytes: .*max_context_tokens"):
            check_handoff_fits(pools, limits, TransferSection(staging_bytes=needed - 1))
