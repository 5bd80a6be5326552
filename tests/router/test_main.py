"""The router as a process runs it: from a model directory to a health check and back."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import stateferry
from router.fakes import CLUSTER_KEY, KEY, byte_tokenizer, description, load
from stateferry.api import worker_codec
from stateferry.config import Config, ModelSection, load_config
from stateferry.core.errors import ConfigError, ModelError
from stateferry.core.ids import Role
from stateferry.router.main import GRACE_S, run_router
from stateferry.router.model_info import read_model_info
from stateferry.v1 import inference_pb2 as pb
from stateferry.v1 import inference_pb2_grpc, membership_pb2, membership_pb2_grpc


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    options = {"vocab_size": 300, "chunk_size": 64, "eos_token_id": 256}
    (directory / "config.json").write_text(json.dumps(options))
    byte_tokenizer()._tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def config(**overrides: object) -> Config:
    base = {"cluster.key": KEY, "router.port": 0, "model.grid_tokens": 32}
    return load_config(overrides={**base, **overrides}, environ={})


async def reports() -> AsyncIterator[membership_pb2.WorkerReport]:
    """What a worker sends for as long as it lives."""
    worker = description(Role.DECODE)
    yield worker_codec.join_report(worker, CLUSTER_KEY)
    for sequence in itertools.count(1):
        yield membership_pb2.WorkerReport(load=worker_codec.load_to_pb(load(sequence)))
        await asyncio.sleep(0.1)


async def test_it_serves_until_told_to_stop(model_dir: Path) -> None:
    addresses: dict[str, str] = {}
    stop = asyncio.Event()
    running = asyncio.create_task(run_router(config(), model_dir, addresses.update, stop))
    async with asyncio.timeout(5):
        while not addresses:
            await asyncio.sleep(0.01)
    async with grpc.aio.insecure_channel(addresses["grpc"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = inference_pb2_grpc.InferenceStub(channel)
        [model] = (await stub.ListModels(pb.ListModelsRequest())).models
        assert (model.name, model.grid_tokens, model.vocab_size) == ("tiny", 32, 300)
        assert addresses["metrics"].startswith("127.0.0.1:")
        joined = membership_pb2_grpc.MembershipStub(channel).Join(reports())
        await joined.read()
        began_s = time.monotonic()
        stop.set()
        await asyncio.wait_for(running, 10)
        assert time.monotonic() - began_s < 0.8 * GRACE_S


async def test_a_bad_key_or_model_is_refused_before_serving(model_dir: Path) -> None:
    stop = asyncio.Event()
    with pytest.raises(ConfigError, match=r"cluster\.key"):
        await run_router(config(**{"cluster.key": "short"}), model_dir, dict.update, stop)
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        await run_router(config(), model_dir, dict.update, stop)


def test_model_info_prefers_the_generation_config(model_dir: Path) -> None:
    assert read_model_info(model_dir, ModelSection()).eos_token_ids == {256}
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 999]}))
    info = read_model_info(model_dir, ModelSection(name="n", grid_tokens=32))
    assert info.eos_token_ids == {1, 2}
    assert (info.name, info.grid_tokens) == ("n", 32)


@pytest.mark.parametrize("option", ["chunk_size", "mamba_chunk_size"])
def test_the_models_own_grid_has_two_names(model_dir: Path, option: str) -> None:
    config_file = model_dir / "config.json"
    config_file.write_text(json.dumps({"vocab_size": 300, option: 128}))
    assert read_model_info(model_dir, ModelSection(grid_tokens=0)).grid_tokens == 128
    config_file.write_text(json.dumps({"vocab_size": 300}))
    with pytest.raises(ModelError, match=r"set model\.grid_tokens"):
        read_model_info(model_dir, ModelSection(grid_tokens=0))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"vocab_size": "9"}', '{"vocab_size": 0}'])
def test_an_unusable_config_is_named(model_dir: Path, content: str) -> None:
    (model_dir / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model_info(model_dir, ModelSection())


def test_the_router_never_loads_torch() -> None:
    check = "import sys, stateferry.router.main; sys.exit('torch' in sys.modules)"
    source_root = str(Path(stateferry.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", check], env={"PYTHONPATH": source_root})
    assert done.returncode == 0
