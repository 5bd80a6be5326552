"""Reading config.json: every option checked where it is read, and named when it does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stateferry.core.errors import ModelError

Raw = Mapping[str, Any]


def read_config(model_dir: Path) -> Raw:
    """The raw config.json. Raises ModelError when it is missing or not a JSON object."""
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return raw


def integer(raw: Raw, option: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of at least ``least``. An option that is null counts as absent; without a
    default it must be there."""
    value = _given(raw, option, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ModelError(f"{option} = {value!r} is not {kind}")
    return value


def number(raw: Raw, option: str, default: float) -> float:
    """A finite number."""
    value = _given(raw, option, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ModelError(f"{option} = {value!r} is not a number")
    return float(value)


def positive(raw: Raw, option: str, default: float) -> float:
    """A finite number above zero."""
    value = number(raw, option, default)
    if value <= 0:
        raise ModelError(f"{option} = {value!r} is not positive")
    return value


def flag(raw: Raw, option: str, default: bool) -> bool:
    """true or false."""
    value = _given(raw, option, default)
    if not isinstance(value, bool):
        raise ModelError(f"{option} = {value!r} is neither true nor false")
    return value


def numbers(raw: Raw, option: str, count: int) -> tuple[float, ...]:
    """``count`` finite numbers, by default all one."""
    value = _given(raw, option, [1.0] * count)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise ModelError(f"{option} = {value!r} is not a list of {count} numbers")
    return tuple(number({option: item}, option, 1.0) for item in value)


def require(raw: Raw, option: str, supported: Sequence[Any], *, default: Any) -> Any:
    """The option's value. Raises ModelError listing what is supported when it is not among it."""
    value = raw.get(option, default)
    if not any(value == fine and type(value) is type(fine) for fine in supported):
        listed = ", ".join(json.dumps(fine) for fine in supported)
        raise ModelError(f"{option} = {value!r} is not supported; supported: {listed}")
    return value


def time_step_limit(raw: Raw) -> tuple[float, float]:
    """``time_step_limit``; JSON has no infinity, so writers spell it in several ways."""
    value = raw.get("time_step_limit")
    if value is None:
        return (0.0, math.inf)
    try:
        low, high = (_bound(bound) for bound in value)
    except (TypeError, ValueError) as error:
        raise ModelError(f"time_step_limit = {value!r} is not a pair of numbers") from error
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ModelError(f"time_step_limit = {value!r} is not an interval")
    return (low, high)


def _bound(bound: Any) -> float:
    if isinstance(bound, Mapping) and set(bound) == {"__float__"}:
        bound = bound["__float__"]
    return float(bound)


def _given(raw: Raw, option: str, default: Any) -> Any:
    value = raw.get(option)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{option} is missing")
    return value
