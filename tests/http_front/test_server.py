"""The HTTP door on a socket: opened, announced, closed."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import httpx2
import pytest

from http_front.front import front
from router.fakes import KEY, byte_tokenizer
from router.scripts import decode_hangs_after_some, prefill_well
from stateferry.config import Config, load_config
from stateferry.core.errors import ConfigError, ModelError
from stateferry.http_front.server import open_http_door, port_of
from stateferry.router.main import run_router


def config(**http: object) -> Config:
    base = {"cluster.key": KEY, "router.port": 0, "model.grid_tokens": 32}
    return load_config(overrides={**base, **{f"http.{k}": v for k, v in http.items()}}, environ={})


@pytest.mark.parametrize(
    ("router_port", "http_port", "wanted"),
    [(50051, -1, 8000), (0, -1, 0), (0, 9000, 9000), (50051, 0, 0)],
)
def test_the_port_follows_the_router_s(router_port: int, http_port: int, wanted: int) -> None:
    overrides = {"router.port": router_port, "http.port": http_port}
    assert port_of(load_config(overrides=overrides, environ={})) == wanted


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    options = {"vocab_size": 300, "chunk_size": 64, "eos_token_id": 256}
    (tmp_path / "config.json").write_text(json.dumps(options))
    byte_tokenizer()._tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


async def test_the_router_announces_it_and_closes_it(model_dir: Path) -> None:
    addresses: dict[str, str] = {}
    stop = asyncio.Event()
    running = asyncio.create_task(
        run_router(config(), model_dir, addresses.update, stop, open_http_door)
    )
    async with asyncio.timeout(10):
        while not addresses:
            await asyncio.sleep(0.01)
    url = f"http://{addresses['http']}"
    async with httpx2.AsyncClient() as client:
        assert (await client.get(f"{url}/health")).status_code == 200
        assert (await client.get(f"{url}/ready")).status_code == 503
    stop.set()
    await asyncio.wait_for(running, 10)
    async with httpx2.AsyncClient() as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get(f"{url}/health")


async def test_it_can_be_turned_off_and_names_what_is_wrong(model_dir: Path) -> None:
    async with front() as door:
        backend = door.cluster.router.backend
        assert await open_http_door(config(enabled=False), model_dir, backend, 1.0) is None
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match="cannot listen") as caught:
                await open_http_door(config(port=port), model_dir, backend, 1.0)
            assert caught.value.key == "http.port"
        (model_dir / "chat_template.jinja").write_text("{% if %}")
        with pytest.raises(ModelError, match="chat template"):
            await open_http_door(config(), model_dir, backend, 1.0)


async def test_a_stop_ends_streams_that_do_not_end(model_dir: Path) -> None:
    async with front(prefill_well, decode_hangs_after_some) as door:
        opened = await open_http_door(config(), model_dir, door.cluster.router.backend, 1.0)
        assert opened is not None
        url = f"http://{opened.address}/v1/completions"
        async with (
            httpx2.AsyncClient() as client,
            client.stream("POST", url, json={"prompt": "hi", "stream": True}) as response,
        ):
            lines = response.aiter_lines()
            assert '"text":"A"' in await anext(lines)
            await asyncio.wait_for(opened.stop(), 5)
            with pytest.raises(httpx2.RemoteProtocolError):
                async for line in lines:
                    assert "[DONE]" not in line
        await door.cluster.assert_clean()
