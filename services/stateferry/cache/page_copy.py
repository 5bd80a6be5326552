"""A copy that is due: asked for while books are kept, made by the next launch, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["state", "tail", "kv"]


class HostBlob:
    """A place in host memory. ``content`` belongs to whoever makes the copies; None until the one
    that fills it was made."""

    __slots__ = ("content",)

    def __init__(self) -> None:
        self.content: object | None = None


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy a state slot, or the first ``rows`` places of a page, on all layers. ``source`` or
    ``target`` may be in host memory; a state never goes from slot to slot."""

    kind: Kind
    source: int | HostBlob
    target: int | HostBlob
    rows: int
