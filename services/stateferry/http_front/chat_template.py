"""Messages -> the text that a model was trained to read, by the template that it comes with.

Templates are code from a model's directory: they run in a sandbox, and see plain data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stateferry.core.eos import read_json_object
from stateferry.core.errors import InvalidRequest, ModelError

# For models that come without one: each message behind its role's name, then the assistant's turn.
FALLBACK = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A compiled template. ``is_fallback``: the model has none; its text then has no special tokens
    of its own, and gets those that any prompt gets."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, is_fallback: bool = False
    ) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template: {error}") from error
        self._special_tokens = dict(special_tokens)
        self.is_fallback = is_fallback

    @classmethod
    def from_directory(cls, model_dir: Path) -> ChatTemplate:
        """chat_template.jinja, else tokenizer_config.json's, else ``FALLBACK``. Raises ModelError
        naming what cannot be used."""
        settings_file = model_dir / _SETTINGS_FILE
        settings = read_json_object(settings_file) if settings_file.is_file() else {}
        source = settings.get("chat_template")
        if (model_dir / _TEMPLATE_FILE).is_file():
            try:
                source = (model_dir / _TEMPLATE_FILE).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ModelError(f"{_TEMPLATE_FILE}: {error}") from error
        if isinstance(source, list):
            source = _default_of(source)
        if source is None:
            return cls(FALLBACK, {}, is_fallback=True)
        if not isinstance(source, str):
            raise ModelError(f"{_SETTINGS_FILE}: chat_template is not a text")
        return cls(source, _special_tokens(settings))

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of ``messages``; ``arguments`` are for the template. Raises InvalidRequest
        when the template cannot render them, for example because it refuses a role."""
        variables = {"tools": None, "documents": None, **self._special_tokens, **(arguments or {})}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise InvalidRequest("messages", f"the chat template refuses them: {error}") from error
        # Of the template's own arithmetic, on values that it does not expect.
        except Exception as error:
            problem = f"the chat template cannot render them: {type(error).__name__}"
            raise InvalidRequest("messages", problem) from error


class _GenerationBlocks(Extension):
    """``{% generation %}`` marks what to train on; what is inside is text like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would write HTML's escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _default_of(named: list[Any]) -> str:
    for entry in named:
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
            if isinstance(template, str):
                return template
    raise ModelError(f"{_SETTINGS_FILE}: none of its chat_templates is named default")


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """By the names that templates know them by, ``bos_token`` for example."""
    found = {}
    for kind in _SPECIAL_TOKENS:
        token = settings.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[f"{kind}_token"] = token
    return found
