"""Options that several commands share, and how they become a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stateferry.config import Config, load_config
from stateferry.core.errors import ConfigError

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; repeatable."),
]
ModelDir = Annotated[
    Path | None, typer.Option("--model", help="Hugging Face model directory. [bundled model]")
]
RouterAddress = Annotated[
    str | None,
    typer.Option("--router", metavar="HOST:PORT", help="Router to talk to. [from settings]"),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def read_config(file: Path | None, settings: list[str] | None, **flags: object) -> Config:
    """Settings from all sources. ``flags`` are named ``section__key``; None means not given."""
    overrides: dict[str, object] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError("--set", f"{setting!r} is not SECTION.KEY=VALUE")
        overrides[key.strip()] = value
    overrides |= {k.replace("__", "."): v for k, v in flags.items() if v is not None}
    return load_config(file, overrides)


def router_address(given: str | None, file: Path | None, settings: list[str] | None) -> str:
    """Where the router is: the flag, else where a router with these settings would listen."""
    if given:
        return given
    config = read_config(file, settings)
    return f"{config.router.host}:{config.router.port}"
