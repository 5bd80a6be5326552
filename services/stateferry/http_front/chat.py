"""The body of /v1/chat/completions -> an order, but for its prompt's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stateferry.core.errors import InvalidRequest
from stateferry.http_front.chat_template import Messages
from stateferry.http_front.fields import Fields
from stateferry.http_front.order import Order, read_delivery
from stateferry.http_front.parameters import fill_common, fill_max_tokens
from stateferry.v1 import inference_pb2 as pb

PROMPT_FIELD = "messages"
_MAX_MESSAGES = 4096
# Templates get these as they are; most read role and content alone.
_PASSED_ON = ("name", "tool_call_id", "tool_calls", "reasoning_content")
# Names that the template's own variables have.
_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the template gets."""

    messages: Messages
    add_generation_prompt: bool
    arguments: dict[str, Any]


def read_chat(content: dict[str, Any]) -> tuple[Order, Conversation]:
    """Raises InvalidRequest naming the field."""
    fields = Fields(content)
    message = pb.GenerateRequest()
    fill_common(message, fields)
    fill_max_tokens(message, fields, "max_completion_tokens", "max_tokens")
    logprobs = fields.flag("logprobs") or False
    top = fields.whole("top_logprobs")
    if top and not logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs")
    if logprobs:
        message.logprobs = top or 0
    conversation = _conversation(fields)
    _refuse_tools(fields)
    delivery = read_delivery(fields)
    fields.refuse_others()
    return Order(message, delivery, logprobs), conversation


def _conversation(fields: Fields) -> Conversation:
    messages = fields.list(PROMPT_FIELD)
    if not messages:
        raise InvalidRequest(PROMPT_FIELD, "is missing or empty")
    if len(messages) > _MAX_MESSAGES:
        raise InvalidRequest(PROMPT_FIELD, f"has more than {_MAX_MESSAGES} messages")
    arguments = fields.any("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise InvalidRequest("chat_template_kwargs", "is not an object")
    for name in _RESERVED:
        if name in arguments:
            raise InvalidRequest(f"chat_template_kwargs.{name}", "cannot be set")
    add_prompt = fields.flag("add_generation_prompt")
    return Conversation(
        [_message(f"{PROMPT_FIELD}[{i}]", value) for i, value in enumerate(messages)],
        True if add_prompt is None else add_prompt,
        arguments,
    )


def _message(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(path, "is not an object")
    fields = Fields(value, path)
    role = fields.text("role")
    if not role:
        raise InvalidRequest(fields.name("role"), "is missing")
    message = {"role": role, "content": _content(fields)}
    for name in _PASSED_ON:
        if (given := fields.any(name)) is not None:
            message[name] = given
    fields.only("refusal", "")
    fields.only("audio")
    fields.only("function_call")
    # Where an answer of OpenAI's is sent back as it came.
    fields.ignore("annotations")
    fields.refuse_others()
    return message


def _content(fields: Fields) -> str:
    """One text: of several parts, one a line."""
    content = fields.any("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(fields.name("content"), "is neither a string nor an array of parts")
    texts = []
    for index, value in enumerate(content):
        path = f"{fields.name('content')}[{index}]"
        part = Fields(value, path) if isinstance(value, dict) else None
        text = part.text("text") if part is not None and part.text("type") == "text" else None
        if text is None:
            raise InvalidRequest(path, "is not a part of type text")
        texts.append(text)
    return "\n".join(texts)


def _refuse_tools(fields: Fields) -> None:
    """Tools, sounds and pictures are not served; asking for none of them is fine."""
    fields.only("tools", [])
    fields.only("tool_choice", "none", "auto")
    fields.only("functions", [])
    fields.only("function_call", "none", "auto")
    fields.only("modalities", ["text"])
    fields.only("audio")
    fields.only("web_search_options")
    fields.only("reasoning_effort", "none")
    fields.only("verbosity", "medium")
    fields.only("store", False)
    fields.ignore("parallel_tool_calls")
