"""Every setting, parsed once: the only module that reads the environment or a configuration file.

A setting is ``section.key``. Later sources win: default, then the TOML file (``[section] key =
..``), then the environment (``STATEFERRY_SECTION_KEY``), then the command line. A component gets
its own frozen section by constructor and never looks anywhere else. docs/CONFIG.md is generated
from here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateferry.core.errors import ConfigError

ENV_PREFIX = "STATEFERRY"
_MAX_PORT = 65535
# Numbers of tokens travel in 32 bits.
_MAX_TOKENS = (1 << 31) - 1
_MAX_THREADS = 4096
AUTO_NICE = -1
AUTO_BYTES = -1


def _setting(
    default: Any,
    help: str,
    *,
    secret: bool = False,
    least: float | None = None,
    most: float | None = None,
    variable: str | None = None,
) -> Any:
    """``least`` and ``most`` bound what is allowed; numbers must be finite. ``variable`` is a
    shorter name in the environment; the full one wins."""
    metadata = {
        "help": help,
        "secret": secret,
        "least": least,
        "most": most,
        "variable": variable,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ClusterSection:
    """What all processes of one cluster share."""

    key: str = _setting(
        "",
        "Secret that signs tickets, 16 bytes or more; the same on every process. "
        "`stateferry serve` draws one when it is empty.",
        secret=True,
    )
    routers: str = _setting("", "host:port of the routers that a worker joins, comma separated.")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """Which model is served, and how its state is laid out."""

    dir: str = _setting(
        "",
        "Hugging Face model directory, or hub id (owner/model, owner/model@revision). "
        "Empty: the bundled model.",
    )
    name: str = _setting("", "Name that clients see. Empty: the directory's name.")
    dtype: str = _setting(
        "float32",
        "Activations and arithmetic: float32 or bfloat16. Weights have the same numbers in memory.",
    )
    numerics: str = _setting(
        "exact",
        "exact: a token's bits do not depend on how it was computed. fast: on a CPU, prefill's "
        "projections by torch, which does not promise that; workers of both refuse each other.",
    )
    grid_tokens: int = _setting(
        64, "Tokens per grid interval of the kernels. 0: the model's own chunk_size.", least=0
    )
    max_context_tokens: int = _setting(
        32768, "Prompt and generated tokens of one request.", least=2, most=_MAX_TOKENS
    )


@dataclass(frozen=True, slots=True)
class RouterSection:
    """The public door."""

    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(50051, "gRPC port; 0 picks a free one.", least=0, most=_MAX_PORT)
    metrics_port: int = _setting(
        0, "Prometheus port on the same host; 0 picks a free one.", least=0, most=_MAX_PORT
    )
    max_prompt_bytes: int = _setting(1 << 20, "Longest prompt text, in UTF-8 bytes.", least=1)
    max_requests: int = _setting(512, "Requests in flight; more are refused at once.", least=1)
    max_queue_s: float = _setting(
        30.0, "Longest wait for a free worker before refusing, seconds.", least=0
    )
    heartbeat_interval_s: float = _setting(0.5, "How often workers report, seconds.", least=0.01)
    ticket_lifetime_s: float = _setting(30.0, "How long a ticket may be used, seconds.", least=1)


@dataclass(frozen=True, slots=True)
class WorkerSection:
    """One prefill or decode worker."""

    id: str = _setting("", "Stable name of the worker, for example decode-0.")
    host: str = _setting("127.0.0.1", "Address to listen on, and to tell others.")
    port: int = _setting(0, "gRPC port; 0 picks a free one.", least=0, most=_MAX_PORT)
    metrics_port: int = _setting(
        0, "Prometheus port on the same host; 0 picks a free one.", least=0, most=_MAX_PORT
    )
    transfer_port: int = _setting(
        0, "Port that receives state (decode); 0 picks a free one.", least=0, most=_MAX_PORT
    )
    max_requests: int = _setting(
        32, "Most sequences held at the same time; memory_bytes may allow fewer.", least=1
    )
    memory_bytes: int = _setting(
        0,
        "Memory for sequences: recurrent state, then keys and values. 0: half of the RAM, or 85 % "
        "of what is free on the GPU once the weights are loaded, shared with the machine's other "
        "workers; never more than needed.",
        least=0,
    )
    workers_per_machine: int = _setting(
        1,
        "Workers that share this machine's memory, this one included. `stateferry serve` counts "
        "those that it starts.",
        least=1,
    )
    max_queue: int = _setting(256, "Requests waiting for a place; more are refused.", least=1)
    extend_budget_tokens: int = _setting(2048, "Prompt tokens per prefill step.", least=1)
    local_prefill_tokens: int = _setting(
        256,
        "A decode worker runs a prompt itself where it has at least half of it cached and lacks no "
        "more than so many tokens, of all prompts that it is running. 0: only one that it lacks "
        "nothing of.",
        least=0,
    )
    device: str = _setting(
        "auto",
        "Where weights and state live: cpu, cuda, or auto, which takes a GPU if Triton runs on it.",
    )
    kernels: str = _setting(
        "auto",
        "Kernel backend: auto, cpu, triton, torch, reference.",
        variable=f"{ENV_PREFIX}_KERNELS",
    )
    decode_graphs: str = _setting(
        "auto",
        "auto captures decode steps as CUDA graphs where they run on a GPU, off never does.",
    )
    threads: int = _setting(1, "CPU threads of one tensor operation.", least=1, most=_MAX_THREADS)
    overlap: str = _setting(
        "auto",
        "Whether a step is planned while the one before it runs: on, off, or auto, which is on for "
        "a GPU; on a CPU the step needs the processor that would plan. A sequence that ends at a "
        "stop id then takes one step too many, whose result nobody gets.",
    )
    step_nice: int = _setting(
        AUTO_NICE,
        "How far the threads that compute steps stand back for other processes: added to their "
        "niceness, 0 to 19. -1: 0, and for decode workers that `stateferry serve` starts beside "
        "prefill workers 15.",
        least=AUTO_NICE,
        most=19,
    )


@dataclass(frozen=True, slots=True)
class CacheSection:
    """What a worker keeps of prompts and sequences, so that later prompts need not compute it."""

    enabled: bool = _setting(True, "Whether prompts resume from what is cached.")
    memory_bytes: int = _setting(
        AUTO_BYTES,
        "Memory for what is cached, besides what running sequences leave idle; part of "
        "worker.memory_bytes. -1: what is left of that, on a CPU at most 1 GiB.",
        least=AUTO_BYTES,
    )
    tokens_per_state: int = _setting(
        384,
        "Tokens whose keys and values are to fit beside each cached state; models without "
        "attention do not care. More where prompts are long and have little in common.",
        least=1,
    )
    eviction: str = _setting(
        "value",
        "What goes first: value (recency, the compute that a byte saves, and how often snapshots "
        "of its kind are used again, which is learned) or lru.",
    )
    snapshot_interval_tokens: int = _setting(
        0,
        "Distance of the states kept inside a prompt, a multiple of the grid. 0: 16 grid "
        "intervals, and 2 while no cached state has to go for that; -1: none but the end and where "
        "prompts part.",
        least=-1,
    )
    max_snapshots_per_prompt: int = _setting(
        16, "More of them are spread further apart. 0: none but the end.", least=0
    )
    max_states_per_path: int = _setting(
        0, "Most states from the beginning of a prompt to its end. 0: no limit.", least=0
    )
    host_bytes: int = _setting(
        0,
        "Memory of the host for what is evicted from the cache: it comes back by a copy. Worth it "
        "where the cache is on a GPU; on a CPU the same bytes do more in memory_bytes. 0: none.",
        least=0,
    )
    state_strategy: str = _setting(
        "extra_buffer",
        "What a decoding sequence leaves: extra_buffer (tracked states and its end), no_buffer "
        "(its end) or off.",
    )
    track_interval_tokens: int = _setting(
        0,
        "Distance of the states kept while decoding, a multiple of the grid. 0: four grid "
        "intervals.",
        least=0,
    )


@dataclass(frozen=True, slots=True)
class TransferSection:
    """The hand-off between workers."""

    max_handoff_bytes: int = _setting(2 << 30, "Largest hand-off that is believed.", least=1)
    staging_bytes: int = _setting(
        2 << 30,
        "Most memory for hand-offs in flight, per process: room for one of the longest at least.",
        least=1,
    )
    connect_timeout_s: float = _setting(1.0, "Longest wait for a connection, seconds.", least=0.01)
    progress_timeout_s: float = _setting(
        5.0, "Longest silence inside a hand-off, seconds.", least=0.01
    )
    seal_timeout_s: float = _setting(
        600.0,
        "Longest wait from reservation to seal, a prompt's queue included, seconds.",
        least=0.01,
    )
    ucx_tls: str = _setting("", "UCX_TLS; empty leaves the choice to UCX.")


@dataclass(frozen=True, slots=True)
class LogSection:
    """What is written to standard error."""

    level: str = _setting("info", "debug, info, warning or error. Prompts are never logged.")


@dataclass(frozen=True, slots=True)
class Config:
    """All sections. Each process uses those of its role."""

    cluster: ClusterSection = ClusterSection()
    model: ModelSection = ModelSection()
    router: RouterSection = RouterSection()
    worker: WorkerSection = WorkerSection()
    cache: CacheSection = CacheSection()
    transfer: TransferSection = TransferSection()
    log: LogSection = LogSection()


def load_config(
    file: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read all sources. ``overrides`` maps ``section.key`` to a value (None: not given).

    Raises ConfigError naming the key of an unknown setting or a value of the wrong type.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, object] = {}
    if file is not None:
        given |= _flatten(_read_toml(file))
    given |= _from_environment(environ)
    given |= {key: value for key, value in (overrides or {}).items() if value is not None}
    return _build(given)


def to_environment(config: Config) -> dict[str, str]:
    """The environment that gives a child process the same configuration, defaults left out."""
    result = {}
    for section_name, section in _sections(config):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value != field.default:
                result[_variable(section_name, field.name)] = str(value)
    return result


def _build(given: Mapping[str, object]) -> Config:
    known = {
        f"{name}.{field.name}" for name, s in _sections(Config()) for field in dataclasses.fields(s)
    }
    for key in given:
        if key not in known:
            raise ConfigError(key, "no such setting")
    sections = {}
    for name, section in _sections(Config()):
        hints = typing.get_type_hints(type(section))
        values = {
            field.name: _checked(
                f"{name}.{field.name}", given[f"{name}.{field.name}"], hints, field
            )
            for field in dataclasses.fields(section)
            if f"{name}.{field.name}" in given
        }
        sections[name] = dataclasses.replace(section, **values)
    return Config(**sections)


def _checked(
    key: str, given: object, hints: Mapping[str, type], field: dataclasses.Field[Any]
) -> object:
    value = _coerce(key, given, hints)
    least = field.metadata["least"]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, f"{value} is not a finite number")
    if least is not None and isinstance(value, int | float) and value < least:
        raise ConfigError(key, f"{value} is below {least}")
    most = field.metadata["most"]
    if most is not None and isinstance(value, int | float) and value > most:
        raise ConfigError(key, f"{value} is above {most}")
    return value


def _coerce(key: str, value: object, hints: Mapping[str, type]) -> object:
    kind = hints[key.rpartition(".")[2]]
    if isinstance(kind, types.UnionType):
        raise ConfigError(key, "optional settings are not supported")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and kind is not str:
        try:
            return kind(value)
        except ValueError:
            raise ConfigError(key, f"{value!r} is not of type {kind.__name__}") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(key, f"{value!r} is not of type {kind.__name__}")
    return value


def _sections(config: Config) -> list[tuple[str, Any]]:
    return [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]


def _variable(section: str, key: str) -> str:
    return f"{ENV_PREFIX}_{section}_{key}".upper()


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, section in _sections(Config()):
        for field in dataclasses.fields(section):
            for variable in (field.metadata["variable"], _variable(name, field.name)):
                if variable is not None and variable in environ:
                    found[f"{name}.{field.name}"] = environ[variable]
    return found


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--config", f"cannot read {file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("--config", f"{file} is not TOML: {error}") from error


def _flatten(tree: Mapping[str, Any]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise ConfigError(section, "settings live in sections, as in [router]")
        flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat
