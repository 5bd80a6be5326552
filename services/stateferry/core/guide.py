"""What an output has to look like, as the client wrote it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

MAX_GUIDE_BYTES = 32 << 10
MAX_GUIDE_CHOICES = 256


class GuideKind(enum.Enum):
    """The language of a guide's source."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    # The source is a JSON array of strings.
    CHOICES = "choices"
    # Lark's notation, as llguidance reads it.
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Guide:
    """Only tokens that lead to an output of this form can be chosen; the end of sequence only
    where the form is complete."""

    kind: GuideKind
    source: str


ANY_JSON_OBJECT = Guide(GuideKind.JSON_SCHEMA, '{"type": "object"}')
