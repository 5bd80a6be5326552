"""Commands that run processes: one role, a whole local cluster, the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stateferry.cli.options import ConfigFile, ModelDir, Settings, read_config
from stateferry.config import Config
from stateferry.local.environment import prepare_this_process
from stateferry.local.lifeline import die_with_parent

ReadyFile = Annotated[
    Path | None, typer.Option("--ready-file", help="Written with addresses once serving.")
]
SupervisorPid = Annotated[int | None, typer.Option("--supervisor-pid", hidden=True)]
Workers = Annotated[int, typer.Option(min=1, max=64, help="Number of workers of this role.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(serve)
    app.command()(demo)
    for command in (router, prefill, decode):
        app.command()(command)


def serve(
    model: ModelDir = None,
    prefill: Workers = 1,
    decode: Workers = 1,
    port: Annotated[int | None, typer.Option(help="Port of the router; 0 picks one.")] = None,
    quiet: Annotated[bool, typer.Option(help="Leave out the logs of the processes.")] = False,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Run a router, prefill and decode workers on this machine, until Ctrl-C."""
    from stateferry.local.serve import serve as serve_cluster

    config = read_config(file, settings, model__dir=_text(model), router__port=port)
    raise typer.Exit(serve_cluster(config, prefill, decode, show_logs=not quiet))


def demo(
    model: ModelDir = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Text file, one prompt per line. [three of ours]")
    ] = None,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Start a cluster, send prompts through it and show what happened."""
    from stateferry.demo import run_demo

    # A free port unless one is asked for: a cluster may already run on the usual one.
    config = read_config(file, ["router.port=0", *(settings or [])], model__dir=_text(model))
    raise typer.Exit(run_demo(config, prompts_file))


def router(
    ready_file: ReadyFile = None,
    supervisor_pid: SupervisorPid = None,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Run a router."""
    _run("router", read_config(file, settings), ready_file, supervisor_pid)


def prefill(
    ready_file: ReadyFile = None,
    supervisor_pid: SupervisorPid = None,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Run a prefill worker."""
    _run("prefill", read_config(file, settings), ready_file, supervisor_pid)


def decode(
    ready_file: ReadyFile = None,
    supervisor_pid: SupervisorPid = None,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Run a decode worker."""
    _run("decode", read_config(file, settings), ready_file, supervisor_pid)


def _run(role: str, config: Config, ready_file: Path | None, supervisor_pid: int | None) -> None:
    if supervisor_pid is not None:
        die_with_parent(supervisor_pid)
    prepare_this_process()
    # Imported last: torch must find the environment prepared.
    from stateferry.wiring import run_process

    run_process(role, config, ready_file)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
