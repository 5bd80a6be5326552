"""The loader of settings: precedence, types, unknown keys, and the way to a child process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from stateferry.config import Config, RouterSection, load_config, to_environment
from stateferry.config_docs import effective_toml, markdown
from stateferry.core.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_when_nothing_is_given() -> None:
    assert load_config(environ={}) == Config()


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path, "[router]\nport = 1\nmetrics_port = 1\nmax_requests = 1\nhost = 'a'\n")
    environ = {
        "STATEFERRY_ROUTER_METRICS_PORT": "2",
        "STATEFERRY_ROUTER_MAX_REQUESTS": "2",
    }
    overrides = {"router.max_requests": "3", "router.host": None}
    config = load_config(file, overrides, environ)
    wanted = RouterSection(host="a", port=1, metrics_port=2, max_requests=3)
    assert config.router == wanted


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[router]\nprot = 1", "router.prot"),
        ("[nothing]\nx = 1", "nothing.x"),
        ("[router]\nport = 'many'", "router.port"),
        ("[router]\nport = true", "router.port"),
        ("[router]\nport = 1.5", "router.port"),
        ("[router]\nhost = 5", "router.host"),
        ("port = 1", "port"),
        ("[router", "--config"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), environ={})
    assert caught.value.key == key


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.toml", environ={})


def test_the_short_name_of_a_setting_yields_to_its_full_name() -> None:
    environ = {"STATEFERRY_KERNELS": "torch"}
    assert load_config(environ=environ).worker.kernels == "torch"
    environ["STATEFERRY_WORKER_KERNELS"] = "reference"
    assert load_config(environ=environ).worker.kernels == "reference"


@pytest.mark.parametrize(
    ("word", "means"), [("False", False), ("false", False), ("0", False), ("True", True)]
)
def test_a_switch_in_the_environment(word: str, means: bool) -> None:
    """Of which a child process is told in words, and every word but the empty one is true."""
    environ = {"STATEFERRY_CACHE_ENABLED": word}
    config = load_config(environ=environ)
    assert config.cache.enabled is means
    assert load_config(environ=to_environment(config)) == config
    with pytest.raises(ConfigError, match="neither true nor false"):
        load_config(environ={"STATEFERRY_CACHE_ENABLED": "perhaps"})


def test_a_wrong_type_in_the_environment_names_the_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={"STATEFERRY_WORKER_THREADS": "two"})
    assert caught.value.key == "worker.threads"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("router.port", 65536),
        ("worker.transfer_port", 70000),
        ("worker.metrics_port", -1),
        ("model.max_context_tokens", 1 << 31),
        ("model.max_context_tokens", 1),
        ("worker.memory_bytes", -1),
        ("worker.threads", 1 << 40),
        ("router.max_queue_s", float("nan")),
        ("transfer.seal_timeout_s", float("inf")),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={key: value}, environ={})
    assert caught.value.key == key


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"worker\.colour"):
        load_config(overrides={"worker.colour": "red"}, environ={})


def test_a_child_gets_the_same_configuration() -> None:
    overrides = {
        "router.port": 0,
        "cluster.key": "k" * 20,
        "transfer.connect_timeout_s": 2.5,
        "model.dir": "/some where/with=signs",
    }
    config = load_config(overrides=overrides, environ={})
    assert load_config(environ=to_environment(config)) == config


def test_whole_numbers_are_fine_for_seconds(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[router]\nmax_queue_s = 5"), environ={})
    assert config.router.max_queue_s == 5.0


def test_the_printed_configuration_masks_secrets_and_loads_again(tmp_path: Path) -> None:
    secret = "open sesame open"
    config = load_config(overrides={"cluster.key": secret, "router.port": 7}, environ={})
    text = effective_toml(config)
    assert secret not in text
    masked = dataclasses.replace(config.cluster, key="***")
    loaded = load_config(write(tmp_path, text), environ={})
    assert loaded == dataclasses.replace(config, cluster=masked)


def test_every_setting_is_documented() -> None:
    page = markdown()
    for section in dataclasses.fields(Config()):
        for field in dataclasses.fields(getattr(Config(), section.name)):
            assert f"`STATEFERRY_{section.name}_{field.name}`".upper() in page
            assert field.metadata["help"].endswith("."), field.name
