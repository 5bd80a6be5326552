"""Commands that look at this installation: config, version."""

from __future__ import annotations

from typing import Annotated

import typer

from stateferry import __version__
from stateferry.cli.options import ConfigFile, Settings, read_config
from stateferry.config_docs import effective_toml, markdown


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(config)
    app.command()(version)


def config(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/CONFIG.md instead.")
    ] = False,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Print the settings in effect as TOML, secrets masked."""
    print(markdown() if as_markdown else effective_toml(read_config(file, settings)), end="")


def version() -> None:
    """Print the version."""
    print(__version__)
