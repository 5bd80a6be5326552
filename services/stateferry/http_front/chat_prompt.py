"""A conversation's tokens, and where later ones are likely to part from it: at message ends."""

from __future__ import annotations

from stateferry.core.errors import InvalidRequest
from stateferry.http_front.chat import PROMPT_FIELD, Conversation
from stateferry.http_front.chat_template import ChatTemplate
from stateferry.router.text import Tokenizer

# Ends of messages that are looked at: what the system says, which other conversations share, and
# the last ones. Each costs a rendering and, up to so many characters, a tokenisation.
_LAST_ENDS = 3
_HINTED_CHARS_MAX = 32768


async def chat_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    conversation: Conversation,
    max_prompt_bytes: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids and snapshot hints. Raises InvalidRequest when the template refuses, or its text is
    longer than ``max_prompt_bytes``."""
    text = _render(template, conversation, len(conversation.messages))
    size_bytes = len(text.encode())
    if size_bytes > max_prompt_bytes:
        problem = f"{size_bytes} bytes are more than {max_prompt_bytes}"
        raise InvalidRequest(PROMPT_FIELD, problem)
    # A template writes special tokens itself.
    specials = template.is_fallback
    ids = await tokenizer.encode(text, add_special_tokens=specials)
    hints = []
    for count in _ends(conversation):
        try:
            prefix = _render(template, conversation, count, is_whole=False)
        except InvalidRequest:
            # Some templates want to see the whole.
            continue
        if not 0 < len(prefix) <= min(len(text), _HINTED_CHARS_MAX) or not text.startswith(prefix):
            continue
        prefix_ids = await tokenizer.encode(prefix, add_special_tokens=specials)
        # A token may reach over the message's end.
        if prefix_ids and ids[: len(prefix_ids)] == prefix_ids:
            hints.append(len(prefix_ids))
    return ids, tuple(sorted(set(hints)))


def _ends(conversation: Conversation) -> list[int]:
    """After how many messages."""
    roles = [message["role"] for message in conversation.messages]
    num_system = 0
    while num_system < len(roles) and roles[num_system] in ("system", "developer"):
        num_system += 1
    ends = {num_system, *range(len(roles) - _LAST_ENDS + 1, len(roles) + 1)}
    return sorted(end for end in ends if 0 < end <= len(roles))


def _render(
    template: ChatTemplate, conversation: Conversation, count: int, *, is_whole: bool = True
) -> str:
    return template.render(
        conversation.messages[:count],
        add_generation_prompt=is_whole and conversation.add_generation_prompt,
        arguments=conversation.arguments,
    )
