"""The body of /v1/completions -> an order."""

from __future__ import annotations

from typing import Any

from stateferry.core.errors import InvalidRequest
from stateferry.http_front.fields import Fields, whole_number
from stateferry.http_front.order import Order, read_delivery
from stateferry.http_front.parameters import fill_common, fill_max_tokens
from stateferry.v1 import inference_pb2 as pb

PROMPT_FIELD = "prompt"


def read_completion(content: dict[str, Any]) -> Order:
    """Raises InvalidRequest naming the field."""
    fields = Fields(content)
    message = pb.GenerateRequest()
    fill_common(message, fields)
    fill_max_tokens(message, fields, "max_tokens", "max_completion_tokens")
    message.echo = fields.flag("echo") or False
    wanted = fields.whole("logprobs")
    if wanted is not None:
        message.logprobs = wanted
        if message.echo:
            message.prompt_logprobs = wanted
    best_of = fields.whole("best_of")
    if best_of is not None and best_of != (message.n if message.HasField("n") else 1):
        raise InvalidRequest("best_of", "is only supported where it equals n")
    if message.echo and message.n > 1:
        raise InvalidRequest("echo", "is only supported with n = 1")
    fields.only("suffix", "")
    fields.only("store", False)
    _fill_prompt(message, fields.any(PROMPT_FIELD))
    delivery = read_delivery(fields)
    fields.refuse_others()
    return Order(message, delivery, logprobs=wanted is not None)


def _fill_prompt(message: pb.GenerateRequest, prompt: Any) -> None:
    """A text, token ids, or an array with one of either."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise InvalidRequest(PROMPT_FIELD, "holds more than one; send a request for each")
        prompt = prompt[0]
    if isinstance(prompt, str):
        message.text = prompt
    elif isinstance(prompt, list):
        ids = [whole_number(f"{PROMPT_FIELD}[{i}]", value) for i, value in enumerate(prompt)]
        message.token_ids.ids.extend(ids)
        # An empty array is a prompt too, and is refused as one.
        message.token_ids.SetInParent()
    elif prompt is None:
        raise InvalidRequest(PROMPT_FIELD, "is missing")
    else:
        raise InvalidRequest(PROMPT_FIELD, "is neither a string nor an array of token ids")
