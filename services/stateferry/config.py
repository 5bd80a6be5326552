"""Every setting, parsed once.

A setting is ``section.key``. Later sources win: default, then the TOML file (``[section] key =
..``), then the environment (``STATEFERRY_SECTION_KEY``), then the command line. A component gets
its own frozen section by constructor and never looks anywhere else. docs/CONFIG.md is generated
from here; config_sources.py reads the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stateferry.config_sources import ENV_PREFIX as ENV_PREFIX
from stateferry.config_sources import environment_of, load, setting

_MAX_PORT = 65535
# Numbers of tokens travel in 32 bits.
_MAX_TOKENS = (1 << 31) - 1
_MAX_THREADS = 4096
AUTO_NICE = -1
AUTO_BYTES = -1
AUTO_PORT = -1


@dataclass(frozen=True, slots=True)
class ClusterSection:
    """What all processes of one cluster share."""

    key: str = setting(
        "",
        "Secret that signs tickets, 16 bytes or more; the same on every process. "
        "`stateferry serve` draws one when it is empty.",
        secret=True,
    )
    routers: str = setting("", "host:port of the routers that a worker joins, comma separated.")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """Which model is served, and how its state is laid out."""

    dir: str = setting(
        "",
        "Hugging Face model directory, or hub id (owner/model, owner/model@revision). "
        "Empty: the bundled model.",
    )
    name: str = setting("", "Name that clients see. Empty: the directory's name.")
    dtype: str = setting(
        "float32",
        "Activations and arithmetic: float32 or bfloat16. Weights have the same numbers in memory.",
    )
    numerics: str = setting(
        "exact",
        "exact: a token's bits do not depend on how it was computed. fast: on a CPU, prefill's "
        "projections by torch, which does not promise that; workers of both refuse each other.",
    )
    grid_tokens: int = setting(
        64, "Tokens per grid interval of the kernels. 0: the model's own chunk_size.", least=0
    )
    max_context_tokens: int = setting(
        32768, "Prompt and generated tokens of one request.", least=2, most=_MAX_TOKENS
    )


@dataclass(frozen=True, slots=True)
class RouterSection:
    """The public door."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(50051, "gRPC port; 0 picks a free one.", least=0, most=_MAX_PORT)
    metrics_port: int = setting(
        0, "Prometheus port on the same host; 0 picks a free one.", least=0, most=_MAX_PORT
    )
    max_prompt_bytes: int = setting(1 << 20, "Longest prompt text, in UTF-8 bytes.", least=1)
    max_requests: int = setting(512, "Requests in flight; more are refused at once.", least=1)
    max_queue_s: float = setting(
        30.0, "Longest wait for a free worker before refusing, seconds.", least=0
    )
    starvation_s: float = setting(
        10.0,
        "Whoever has waited for so long for a worker comes before requests of any priority, "
        "seconds.",
        least=0,
    )
    max_attempts: int = setting(
        4,
        "Attempts at one request: a worker that is lost costs one, and the stream goes on behind "
        "what was sent. 1: it ends instead.",
        least=1,
    )
    failover_wait_s: float = setting(
        30.0,
        "Longest wait of a request that lost its worker until another one comes, seconds.",
        least=0,
    )
    heartbeat_interval_s: float = setting(0.5, "How often workers report, seconds.", least=0.01)
    ticket_lifetime_s: float = setting(30.0, "How long a ticket may be used, seconds.", least=1)


@dataclass(frozen=True, slots=True)
class HttpSection:
    """The OpenAI-compatible door, in the router's process."""

    enabled: bool = setting(True, "Whether the router answers HTTP as well.")
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(
        AUTO_PORT,
        "HTTP port; 0 picks a free one. -1: 8000, and a free one where router.port is 0.",
        least=AUTO_PORT,
        most=_MAX_PORT,
    )
    max_body_bytes: int = setting(8 << 20, "Longest body of a request, in bytes.", least=1)


@dataclass(frozen=True, slots=True)
class WorkerSection:
    """One prefill or decode worker."""

    id: str = setting("", "Stable name of the worker, for example decode-0.")
    host: str = setting("127.0.0.1", "Address to listen on, and to tell others.")
    port: int = setting(0, "gRPC port; 0 picks a free one.", least=0, most=_MAX_PORT)
    metrics_port: int = setting(
        0, "Prometheus port on the same host; 0 picks a free one.", least=0, most=_MAX_PORT
    )
    transfer_port: int = setting(
        0, "Port that receives state (decode); 0 picks a free one.", least=0, most=_MAX_PORT
    )
    max_requests: int = setting(
        32, "Most sequences held at the same time; memory_bytes may allow fewer.", least=1
    )
    memory_bytes: int = setting(
        0,
        "Memory for sequences: recurrent state, then keys and values. 0: half of the RAM, or 85 % "
        "of what is free on the GPU once the weights are loaded, shared with the machine's other "
        "workers; never more than needed.",
        least=0,
    )
    workers_per_machine: int = setting(
        1,
        "Workers that share this machine's memory, this one included. `stateferry serve` counts "
        "those that it starts.",
        least=1,
    )
    max_queue: int = setting(256, "Requests waiting for a place; more are refused.", least=1)
    starvation_s: float = setting(
        10.0,
        "Whoever has waited for so long for memory, or for its prompt's next step, comes before "
        "requests of any priority, and is not preempted any more, seconds.",
        least=0,
    )
    preempt: bool = setting(
        True,
        "Whether a decode worker pauses the sequence of the lowest priority, the youngest of them, "
        "where one of higher priority lacks memory. It goes on from its state, which is left to "
        "the cache meanwhile.",
    )
    extend_budget_tokens: int = setting(2048, "Prompt tokens per prefill step.", least=1)
    local_prefill_tokens: int = setting(
        256,
        "A decode worker runs a prompt itself where it has at least half of it cached and lacks no "
        "more than so many tokens, of all prompts that it is running. 0: only one that it lacks "
        "nothing of.",
        least=0,
    )
    device: str = setting(
        "auto",
        "Where weights and state live: cpu, cuda, or auto, which takes a GPU if Triton runs on it.",
    )
    kernels: str = setting(
        "auto",
        "Kernel backend: auto, cpu, triton, torch, reference.",
        variable=f"{ENV_PREFIX}_KERNELS",
    )
    decode_graphs: str = setting(
        "auto",
        "auto captures decode steps as CUDA graphs where they run on a GPU, off never does.",
    )
    threads: int = setting(1, "CPU threads of one tensor operation.", least=1, most=_MAX_THREADS)
    overlap: str = setting(
        "auto",
        "Whether a step is planned while the one before it runs: on, off, or auto, which is on for "
        "a GPU; on a CPU the step needs the processor that would plan. A sequence that ends at a "
        "stop id then takes one step too many, whose result nobody gets.",
    )
    step_nice: int = setting(
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

    enabled: bool = setting(True, "Whether prompts resume from what is cached.")
    memory_bytes: int = setting(
        AUTO_BYTES,
        "Memory for what is cached, besides what running sequences leave idle; part of "
        "worker.memory_bytes. -1: what is left of that, on a CPU at most 1 GiB.",
        least=AUTO_BYTES,
    )
    tokens_per_state: int = setting(
        384,
        "Tokens whose keys and values are to fit beside each cached state; models without "
        "attention do not care. More where prompts are long and have little in common.",
        least=1,
    )
    eviction: str = setting(
        "value",
        "What goes first: value (recency, the compute that a byte saves, and how often snapshots "
        "of its kind are used again, which is learned) or lru.",
    )
    snapshot_interval_tokens: int = setting(
        0,
        "Distance of the states kept inside a prompt, a multiple of the grid. 0: 16 grid "
        "intervals, and 2 while no cached state has to go for that; -1: none but the end and where "
        "prompts part.",
        least=-1,
    )
    max_snapshots_per_prompt: int = setting(
        16, "More of them are spread further apart. 0: none but the end.", least=0
    )
    max_states_per_path: int = setting(
        0, "Most states from the beginning of a prompt to its end. 0: no limit.", least=0
    )
    host_bytes: int = setting(
        0,
        "Memory of the host for what is evicted from the cache: it comes back by a copy. Worth it "
        "where the cache is on a GPU; on a CPU the same bytes do more in memory_bytes. 0: none.",
        least=0,
    )
    session_share: float = setting(
        0.5,
        "Most of the memory for sequences and cache, as a share, that the last turns of sessions "
        "may have so that other cached state is evicted first. Who needs memory to run gets it all "
        "the same.",
        least=0,
        most=1,
    )
    session_ttl_s: float = setting(
        600.0, "How long a turn of a session is kept so, from its end, seconds.", least=0
    )
    state_strategy: str = setting(
        "extra_buffer",
        "What a decoding sequence leaves: extra_buffer (tracked states and its end), no_buffer "
        "(its end) or off.",
    )
    track_interval_tokens: int = setting(
        0,
        "Distance of the states kept while decoding, a multiple of the grid. 0: four grid "
        "intervals.",
        least=0,
    )


@dataclass(frozen=True, slots=True)
class SpeculationSection:
    """Guesses at the next tokens, several of which one step can prove right. No token changes."""

    drafter: str = setting(
        "off",
        "Who guesses: off, or ngram, which goes by what the sequence itself has said before. A "
        "sequence whose guesses do not pay is decoded without them.",
    )
    draft_tokens: int = setting(
        12, "Most guesses for one sequence in one step; less than a grid interval.", least=1
    )
    draft_paths: int = setting(
        1,
        "Most continuations of one draft: more than one make it a tree.",
        least=1,
        most=16,
    )


NO_SPECULATION = SpeculationSection()


@dataclass(frozen=True, slots=True)
class TransferSection:
    """The hand-off between workers."""

    max_handoff_bytes: int = setting(2 << 30, "Largest hand-off that is believed.", least=1)
    staging_bytes: int = setting(
        2 << 30,
        "Most memory for hand-offs in flight, per process: room for one of the longest at least.",
        least=1,
    )
    connect_timeout_s: float = setting(3.0, "Longest wait for a connection, seconds.", least=0.01)
    progress_timeout_s: float = setting(
        5.0, "Longest silence inside a hand-off, seconds.", least=0.01
    )
    seal_timeout_s: float = setting(
        600.0,
        "Longest wait from reservation to seal, a prompt's queue included, seconds.",
        least=0.01,
    )
    ucx_tls: str = setting("", "UCX_TLS; empty leaves the choice to UCX.")


@dataclass(frozen=True, slots=True)
class LogSection:
    """What is written to standard error."""

    level: str = setting("info", "debug, info, warning or error. Prompts are never logged.")


@dataclass(frozen=True, slots=True)
class Config:
    """All sections. Each process uses those of its role."""

    cluster: ClusterSection = ClusterSection()
    model: ModelSection = ModelSection()
    router: RouterSection = RouterSection()
    http: HttpSection = HttpSection()
    worker: WorkerSection = WorkerSection()
    cache: CacheSection = CacheSection()
    speculation: SpeculationSection = SpeculationSection()
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
    return load(Config(), file, overrides, environ)


def to_environment(config: Config) -> dict[str, str]:
    """The environment that gives a child process the same configuration, defaults left out."""
    return environment_of(config)
