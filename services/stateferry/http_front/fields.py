"""Reads a JSON body field by field; what is wrong is named, and what nobody read is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from stateferry.core.errors import InvalidRequest

MAX_UINT32 = (1 << 32) - 1
MAX_INT32 = (1 << 31) - 1


def parse_object(raw: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises InvalidRequest."""
    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        # An escape can write half of a surrogate pair, which is no text.
        if b"\\u" in raw:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        problem = "is nested too deeply" if isinstance(error, RecursionError) else "is not JSON"
        raise InvalidRequest("body", problem) from None
    if not isinstance(content, dict):
        raise InvalidRequest("body", "is not a JSON object")
    return content


class Fields:
    """One JSON object. A field that is null counts as absent."""

    def __init__(self, content: Mapping[str, Any], path: str = "") -> None:
        self._content = content
        self._path = path
        self._read: set[str] = set()

    def name(self, key: str) -> str:
        """The field's name from the body's top."""
        return f"{self._path}.{key}" if self._path else key

    def any(self, key: str) -> Any:
        """The value, whatever it is; None when absent."""
        self._read.add(key)
        return self._content.get(key)

    def text(self, key: str) -> str | None:
        value = self.any(key)
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(self.name(key), "is not a string")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.any(key)
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(self.name(key), "is not true or false")
        return value

    def whole(self, key: str, least: int = 0, most: int = MAX_UINT32) -> int | None:
        value = self.any(key)
        return None if value is None else whole_number(self.name(key), value, least, most)

    def number(self, key: str) -> float | None:
        value = self.any(key)
        return None if value is None else number(self.name(key), value)

    def object(self, key: str) -> Fields | None:
        value = self.any(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise InvalidRequest(self.name(key), "is not an object")
        return Fields(value, self.name(key))

    def list(self, key: str) -> list[Any] | None:
        value = self.any(key)
        if value is not None and not isinstance(value, list):
            raise InvalidRequest(self.name(key), "is not an array")
        return value

    def ignore(self, *keys: str) -> None:
        """These change nothing of an answer."""
        self._read.update(keys)

    def only(self, key: str, *neutral: Any) -> None:
        """A field of OpenAI's that is not served: only values that ask for nothing pass."""
        value = self.any(key)
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise InvalidRequest(self.name(key), "is not supported here")

    def refuse_others(self) -> None:
        """Raises InvalidRequest naming the first field that nobody asked for: it is something that
        the client wants and we would silently not do."""
        for key in self._content:
            if key not in self._read:
                raise InvalidRequest(self.name(str(key)), "is not a field that is known here")


def whole_number(name: str, value: Any, least: int = 0, most: int = MAX_UINT32) -> int:
    """``value`` if it is an integer in [least, most]. Raises InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, "is not an integer")
    if not least <= value <= most:
        raise InvalidRequest(name, f"is not in [{least}, {most}]")
    return value


def number(name: str, value: Any) -> float:
    """``value`` if it is a finite number of single precision's range. Raises InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(name, "is not a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    # Beyond it the message could not hold it.
    if not abs(result) < 3e38:
        raise InvalidRequest(name, "is too large")
    return result


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
