"""From a client's guide to the one notation that llguidance compiles."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher, grammar_from

from stateferry.core.errors import InvalidRequest
from stateferry.core.guide import Guide, GuideKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Free whitespace would let a model that is unsure write blanks until it runs out of tokens.
_JSON_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_FIELDS = {kind: f"guide.{kind.value}" for kind in GuideKind}
_MAX_PROBLEM_CHARS = 500


def grammar_text(guide: Guide) -> str:
    """Raises InvalidRequest naming the guide's field when its source cannot even be read."""
    try:
        match guide.kind:
            case GuideKind.JSON_SCHEMA:
                return _from_schema(guide.source)
            case GuideKind.REGEX:
                return LLMatcher.grammar_from_regex(guide.source)
            case GuideKind.CHOICES:
                return _from_choices(guide.source)
            case GuideKind.GRAMMAR:
                return LLMatcher.grammar_from_lark(guide.source)
    except (ValueError, TypeError, RecursionError) as error:
        raise refusal(guide, str(error)) from error


def refusal(guide: Guide, problem: str) -> InvalidRequest:
    """What the client hears of a guide that cannot be used."""
    text = " ".join(problem.split())
    return InvalidRequest(_FIELDS[guide.kind], text[:_MAX_PROBLEM_CHARS] or "cannot be used")


def _from_choices(source: str) -> str:
    texts = json.loads(source)
    if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
        raise ValueError("must be a list of texts")
    return grammar_from("choice", source)


def _from_schema(source: str) -> str:
    schema = json.loads(source)
    if not isinstance(schema, dict):
        raise ValueError("a schema must be a JSON object")
    # The style is ours, whatever llguidance's own extension inside the schema says.
    return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_STYLE)
