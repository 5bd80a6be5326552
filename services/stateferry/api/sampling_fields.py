"""What a client may set of how tokens are chosen: checked, with the name of the field."""

from __future__ import annotations

import json
import math
import secrets

from stateferry.core.errors import InvalidRequest
from stateferry.core.guide import (
    ANY_JSON_OBJECT,
    MAX_GUIDE_BYTES,
    MAX_GUIDE_CHOICES,
    Guide,
    GuideKind,
)
from stateferry.core.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIAS_IDS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    Penalties,
    SamplingParams,
)
from stateferry.v1 import inference_pb2 as pb


def sampling_fields(message: pb.GenerateRequest, vocab_size: int) -> SamplingParams:
    """Raises InvalidRequest naming the field."""
    wanted = message.sampling
    temperature = wanted.temperature if wanted.HasField("temperature") else 1.0
    _check_range("temperature", temperature, 0.0, MAX_TEMPERATURE)
    top_p = wanted.top_p if wanted.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequest("sampling.top_p", "is not in (0, 1]")
    if wanted.top_k > vocab_size:
        raise InvalidRequest("sampling.top_k", f"is above the vocabulary's {vocab_size}")
    _check_range("min_p", wanted.min_p, 0.0, 1.0)
    return SamplingParams(
        temperature=math.fabs(temperature),  # -0.0 is greedy like 0.0.
        top_k=wanted.top_k,
        top_p=top_p,
        seed=wanted.seed if wanted.HasField("seed") else secrets.randbits(64),
        logprobs=num_logprobs(
            "logprobs", message.logprobs if message.HasField("logprobs") else None
        ),
        min_p=math.fabs(wanted.min_p),
        penalties=_penalties(wanted),
        logit_bias=_logit_bias(wanted, vocab_size),
        guide=_guide(message.guide) if message.HasField("guide") else None,
    )


def num_logprobs(field: str, wanted: int | None) -> int | None:
    """``wanted`` if it may be asked for. Raises InvalidRequest naming ``field``."""
    if wanted is not None and wanted > MAX_LOGPROBS:
        raise InvalidRequest(field, f"is above {MAX_LOGPROBS}")
    return wanted


def _penalties(wanted: pb.SamplingParams) -> Penalties:
    repetition = wanted.repetition_penalty if wanted.HasField("repetition_penalty") else 1.0
    _check_range("repetition_penalty", repetition, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    for name in ("presence_penalty", "frequency_penalty"):
        _check_range(name, getattr(wanted, name), -MAX_PENALTY, MAX_PENALTY)
    return Penalties(repetition, wanted.presence_penalty, wanted.frequency_penalty)


def _logit_bias(wanted: pb.SamplingParams, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(wanted.logit_bias) > MAX_LOGIT_BIAS_IDS:
        raise InvalidRequest("sampling.logit_bias", f"has more than {MAX_LOGIT_BIAS_IDS} ids")
    biases: dict[int, float] = {}
    for index, entry in enumerate(wanted.logit_bias):
        name = f"logit_bias[{index}]"
        if entry.token_id >= vocab_size:
            raise InvalidRequest(
                f"sampling.{name}.token_id", f"is not below the vocabulary's {vocab_size}"
            )
        if entry.token_id in biases:
            raise InvalidRequest(f"sampling.{name}.token_id", "was there before")
        _check_range(f"{name}.bias", entry.bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        biases[entry.token_id] = entry.bias
    return tuple(sorted(biases.items()))


def _guide(wanted: pb.Guide) -> Guide:
    form = wanted.WhichOneof("form")
    if form is None:
        raise InvalidRequest("guide", "set one of its forms")
    if form == "json_object":
        if not wanted.json_object:
            raise InvalidRequest("guide.json_object", "must be true where it is set")
        return ANY_JSON_OBJECT
    source = _choices(wanted.choices) if form == "choices" else str(getattr(wanted, form))
    if not source:
        raise InvalidRequest(f"guide.{form}", "must not be empty")
    if len(source.encode()) > MAX_GUIDE_BYTES:
        raise InvalidRequest(f"guide.{form}", f"has more than {MAX_GUIDE_BYTES} bytes")
    return Guide(GuideKind(form), source)


def _choices(wanted: pb.Choices) -> str:
    if not 1 <= len(wanted.texts) <= MAX_GUIDE_CHOICES:
        raise InvalidRequest("guide.choices.texts", f"are not 1 to {MAX_GUIDE_CHOICES}")
    for index, text in enumerate(wanted.texts):
        if not text:
            raise InvalidRequest(f"guide.choices.texts[{index}]", "must not be empty")
    return json.dumps(list(wanted.texts), ensure_ascii=False)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    # The comparison is written so that NaN fails it.
    if not least <= value <= most:
        raise InvalidRequest(f"sampling.{name}", f"is not in [{least:g}, {most:g}]")
