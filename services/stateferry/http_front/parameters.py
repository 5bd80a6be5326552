"""JSON fields that both endpoints have -> the gRPC API's GenerateRequest, whose checks then decide.

Only types and ranges that the message could not even hold are checked here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from stateferry.core.errors import InvalidRequest
from stateferry.http_front.fields import MAX_INT32, MAX_UINT32, Fields, number, whole_number
from stateferry.v1 import inference_pb2 as pb

_MAX_UINT64 = (1 << 64) - 1
_MIN_INT64 = -(1 << 63)
# Of the client's own book-keeping: the same answer comes with and without.
_IGNORED = (
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
)


def fill_common(request: pb.GenerateRequest, fields: Fields) -> None:
    """Everything but the prompt, log-probabilities and the most tokens. Raises InvalidRequest."""
    fields.ignore(*_IGNORED)
    request.model = fields.text("model") or ""
    _fill_sampling(request.sampling, fields)
    _fill_stop(request.stop, fields)
    _fill_guide(request, fields)
    if (count := fields.whole("n")) is not None:
        request.n = count
    if (skip := fields.flag("skip_special_tokens")) is not None:
        request.skip_special_tokens = skip
    request.tenant = fields.text("tenant") or ""
    request.cache_salt = fields.text("cache_salt") or ""
    request.session_id = fields.text("session_id") or ""
    request.priority = fields.whole("priority", -MAX_INT32, MAX_INT32) or 0


def fill_max_tokens(request: pb.GenerateRequest, fields: Fields, *names: str) -> None:
    """The most tokens, under the first of ``names`` that is there; two that differ are refused."""
    given = {name: value for name in names if (value := fields.whole(name)) is not None}
    if len(set(given.values())) > 1:
        raise InvalidRequest(names[0], f"differs from {names[1]}")
    for value in given.values():
        request.stop.max_tokens = value


def _fill_sampling(sampling: pb.SamplingParams, fields: Fields) -> None:
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        if (value := fields.number(name)) is not None:
            setattr(sampling, name, value)
    # -1 is how other servers spell "all".
    if (top_k := fields.whole("top_k", -1)) is not None:
        sampling.top_k = max(0, top_k)
    if (seed := fields.whole("seed", _MIN_INT64, _MAX_UINT64)) is not None:
        sampling.seed = seed & _MAX_UINT64
    biases = fields.any("logit_bias")
    if biases is None:
        return
    if not isinstance(biases, dict):
        raise InvalidRequest("logit_bias", "is not an object")
    for key, bias in biases.items():
        if not re.fullmatch(r"[0-9]{1,10}", key) or int(key) > MAX_UINT32:
            raise InvalidRequest("logit_bias", "has a key that is not a token id")
        sampling.logit_bias.add(token_id=int(key), bias=number("logit_bias", bias))


def _fill_stop(stop: pb.StopConditions, fields: Fields) -> None:
    strings = fields.any("stop")
    if isinstance(strings, str):
        strings = [strings]
    if strings is not None:
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise InvalidRequest("stop", "is neither a string nor an array of strings")
        stop.strings.extend(strings)
    for index, token_id in enumerate(fields.list("stop_token_ids") or ()):
        stop.token_ids.append(whole_number(f"stop_token_ids[{index}]", token_id))
    if (min_tokens := fields.whole("min_tokens")) is not None:
        stop.min_tokens = min_tokens
    stop.ignore_eos = fields.flag("ignore_eos") or False
    stop.include_stop = fields.flag("include_stop_str_in_output") or False


def _fill_guide(request: pb.GenerateRequest, fields: Fields) -> None:
    form = fields.object("response_format")
    if form is None:
        return
    kind = form.text("type")
    if kind == "json_object":
        request.guide.json_object = True
    elif kind == "json_schema":
        wanted = form.object("json_schema")
        if wanted is None:
            raise InvalidRequest(form.name("json_schema"), "is missing")
        wanted.ignore("name", "description", "strict")
        schema: Any = wanted.any("schema")
        if not isinstance(schema, dict | bool):
            raise InvalidRequest(wanted.name("schema"), "is not a JSON schema")
        request.guide.json_schema = json.dumps(schema, ensure_ascii=False)
        wanted.refuse_others()
    elif kind != "text":
        raise InvalidRequest(form.name("type"), "is not text, json_object or json_schema")
    form.refuse_others()
