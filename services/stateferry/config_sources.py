"""Where settings come from: defaults, a TOML file, the environment, the command line.

Of any dataclass of sections, each a frozen dataclass whose fields are ``setting``s.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from stateferry.core.errors import ConfigError

ENV_PREFIX = "STATEFERRY"

ConfigT = TypeVar("ConfigT")
# Of the environment and the command line; TOML has its own.
_WORDS = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


def setting(
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


def load(
    defaults: ConfigT,
    file: Path | None,
    overrides: Mapping[str, object] | None,
    environ: Mapping[str, str] | None,
) -> ConfigT:
    """``defaults`` with what the sources say. ``overrides`` maps ``section.key`` to a value (None:
    not given); ``environ`` None: this process's.

    Raises ConfigError naming the key of an unknown setting or a value of the wrong type.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, object] = {}
    if file is not None:
        given |= _flatten(_read_toml(file))
    given |= _from_environment(defaults, environ)
    given |= {key: value for key, value in (overrides or {}).items() if value is not None}
    return _build(defaults, given)


def environment_of(config: object) -> dict[str, str]:
    """The environment that gives a child process the same configuration, defaults left out."""
    result = {}
    for section_name, section in _sections(config):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value != field.default:
                result[_variable(section_name, field.name)] = str(value)
    return result


def _build(defaults: ConfigT, given: Mapping[str, object]) -> ConfigT:
    known = {
        f"{name}.{field.name}" for name, s in _sections(defaults) for field in dataclasses.fields(s)
    }
    for key in given:
        if key not in known:
            raise ConfigError(key, "no such setting")
    sections = {}
    for name, section in _sections(defaults):
        hints = typing.get_type_hints(type(section))
        values = {
            field.name: _checked(
                f"{name}.{field.name}", given[f"{name}.{field.name}"], hints, field
            )
            for field in dataclasses.fields(section)
            if f"{name}.{field.name}" in given
        }
        sections[name] = dataclasses.replace(section, **values)
    return dataclasses.replace(defaults, **sections)  # type: ignore[type-var]


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
    if isinstance(value, str) and kind is bool:
        if value.lower() not in _WORDS:
            raise ConfigError(key, f"{value!r} is neither true nor false")
        return _WORDS[value.lower()]
    if isinstance(value, str) and kind is not str:
        try:
            return kind(value)
        except ValueError:
            raise ConfigError(key, f"{value!r} is not of type {kind.__name__}") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(key, f"{value!r} is not of type {kind.__name__}")
    return value


def _sections(config: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]


def _variable(section: str, key: str) -> str:
    return f"{ENV_PREFIX}_{section}_{key}".upper()


def _from_environment(defaults: object, environ: Mapping[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, section in _sections(defaults):
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
