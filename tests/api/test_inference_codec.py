"""Whatever bytes a client sends: a checked request, or the name of the field that is wrong."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable

import pytest

from stateferry.api import answer_codec as answers
from stateferry.api import inference_codec as codec
from stateferry.core.errors import InvalidRequest
from stateferry.core.guide import ANY_JSON_OBJECT, Guide, GuideKind
from stateferry.core.sampling import FinishReason, Penalties, SampledToken, TokenLogprob
from stateferry.v1 import inference_pb2 as pb

EOS = 7
LIMITS = codec.RequestLimits("tiny", 300, 4096, 1 << 16, frozenset({EOS}))

Edit = Callable[[pb.GenerateRequest], None]


def good() -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", stop=pb.StopConditions(max_tokens=5))


def parse(message: pb.GenerateRequest | bytes) -> codec.ClientRequest:
    payload = message if isinstance(message, bytes) else message.SerializeToString()
    return codec.parse_generate(payload, LIMITS)


def field_of(message: pb.GenerateRequest | bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse(message)
    assert str(caught.value).startswith(caught.value.field)
    return caught.value.field


def chunk(number: int, content: bytes) -> bytes:
    """One length-delimited field, whatever it holds; up to 16383 bytes."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([number << 3 | 2]) + length + content


def test_defaults() -> None:
    client = parse(pb.GenerateRequest(text="hello"))
    assert client.request_id.startswith("req-")
    assert client.prompt == "hello"
    sampling = client.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert sampling.logprobs is None
    assert client.stop == codec.ClientStop(None, 0, (), frozenset({EOS}))
    request = codec.complete_request(client, (1, 2), LIMITS)
    assert request.stop.max_tokens == 128
    # Context that is nearly full caps the default, but never a wish.
    assert codec.complete_request(client, (1,) * 4090, LIMITS).stop.max_tokens == 6


def test_unset_seeds_differ_and_set_ones_stay() -> None:
    assert parse(good()).sampling.seed != parse(good()).sampling.seed
    message = good()
    message.sampling.seed = 2**64 - 1
    assert parse(message).sampling.seed == 2**64 - 1


def test_everything_set_arrives() -> None:
    client = parse(
        pb.GenerateRequest(
            request_id="a.b:c-1",
            model="tiny",
            token_ids=pb.TokenIds(ids=[0, 299]),
            sampling=pb.SamplingParams(temperature=0.0, top_k=300, top_p=0.5, seed=0),
            stop=pb.StopConditions(
                max_tokens=9, min_tokens=9, strings=["é" * 128], token_ids=[3], ignore_eos=True
            ),
            logprobs=20,
            tenant="t1",
        )
    )
    assert (client.request_id, client.tenant, client.prompt) == ("a.b:c-1", "t1", (0, 299))
    assert (client.sampling.temperature, client.sampling.seed) == (0.0, 0)
    assert client.sampling.logprobs == 20
    assert client.stop == codec.ClientStop(9, 9, ("é" * 128,), frozenset({3}))


def test_sampling_and_answers_arrive() -> None:
    client = parse(
        pb.GenerateRequest(
            text="x",
            sampling=pb.SamplingParams(
                min_p=0.25,
                repetition_penalty=1.5,
                presence_penalty=-0.5,
                frequency_penalty=2.0,
                logit_bias=[pb.LogitBias(token_id=5, bias=-100.0), pb.LogitBias(token_id=2)],
            ),
            stop=pb.StopConditions(include_stop=True),
            guide=pb.Guide(choices=pb.Choices(texts=["é", '"'])),
            n=16,
            echo=True,
            prompt_logprobs=3,
            skip_special_tokens=False,
        )
    )
    sampling = client.sampling
    assert sampling.min_p == 0.25
    assert sampling.penalties == Penalties(1.5, -0.5, 2.0)
    assert sampling.logit_bias == ((2, 0.0), (5, -100.0))
    assert sampling.guide == Guide(GuideKind.CHOICES, '["é", "\\""]')
    assert client.answer == codec.AnswerOptions(16, True, 3, False, True)
    assert codec.complete_request(client, (1,), LIMITS).prompt_logprobs == 3
    assert parse(good()).answer == codec.AnswerOptions()
    assert parse(good()).sampling.penalties == Penalties()
    assert parse(good()).sampling.guide is None


@pytest.mark.parametrize("form", ["json_schema", "regex", "grammar"])
def test_a_guide_is_taken_as_it_is_written(form: str) -> None:
    guide = pb.Guide(**{form: " {x} "})  # type: ignore[arg-type]
    client = parse(pb.GenerateRequest(text="x", guide=guide))
    assert client.sampling.guide == Guide(GuideKind(form), " {x} ")


def test_a_guide_needs_an_end_of_sequence() -> None:
    limits = dataclasses.replace(LIMITS, eos_token_ids=frozenset())
    message = pb.GenerateRequest(text="x", guide=pb.Guide(json_object=True))
    assert parse(message).sampling.guide == ANY_JSON_OBJECT
    with pytest.raises(InvalidRequest, match="guide: "):
        codec.parse_generate(message.SerializeToString(), limits)


def test_the_largest_request_that_is_allowed_is_allowed() -> None:
    """Every list full, beside a prompt of the most bytes."""
    message = pb.GenerateRequest(
        text="x" * LIMITS.max_prompt_bytes,
        guide=pb.Guide(choices=pb.Choices(texts=["x" * 120] * 256)),
        stop=pb.StopConditions(
            strings=["x" * 256] * 16, token_ids=[LIMITS.vocab_size - 1] * 64, max_tokens=4000
        ),
        tenant="t" * 128,
        request_id="r" * 128,
    )
    add_biases(message, *((i, 1.5) for i in range(300)))
    assert parse(message).prompt == message.text


def test_stop_ids_hold_the_models_end_unless_ignored() -> None:
    message = good()
    message.stop.token_ids.append(3)
    assert parse(message).stop.token_ids == {3, EOS}


def add_biases(request: pb.GenerateRequest, *biases: tuple[int, float]) -> None:
    request.sampling.logit_bias.extend(pb.LogitBias(token_id=i, bias=b) for i, b in biases)


def set_stop(request: pb.GenerateRequest, **stop: int) -> None:
    request.stop.MergeFrom(pb.StopConditions(**stop))  # type: ignore[arg-type]


EDITS: list[tuple[str, Edit]] = [
    ("text", lambda r: setattr(r, "text", "")),
    ("text", lambda r: setattr(r, "text", "é" * (1 << 15) + "x")),
    ("text", lambda r: setattr(r, "text", "x" * 10_000_000)),
    ("prompt", lambda r: r.ClearField("text")),
    ("token_ids", lambda r: r.token_ids.SetInParent()),
    ("token_ids", lambda r: r.token_ids.ids.extend([1] * 4096)),
    ("token_ids", lambda r: r.token_ids.ids.extend([1] * 5_000_000)),
    ("token_ids.ids[2]", lambda r: r.token_ids.ids.extend([1, 2, 300])),
    ("token_ids.ids[0]", lambda r: r.token_ids.ids.extend([2**32 - 1])),
    ("stop.max_tokens", lambda r: setattr(r.stop, "max_tokens", 0)),
    ("stop.max_tokens", lambda r: setattr(r.stop, "max_tokens", 4096)),
    ("stop.max_tokens", lambda r: setattr(r.stop, "max_tokens", 2**31)),
    ("stop.max_tokens", lambda r: setattr(r.stop, "max_tokens", 2**32 - 1)),
    ("stop.min_tokens", lambda r: setattr(r.stop, "min_tokens", 6)),
    ("stop.strings", lambda r: r.stop.strings.extend(["x"] * 17)),
    ("stop.strings[1]", lambda r: r.stop.strings.extend(["x", ""])),
    ("stop.strings[0]", lambda r: r.stop.strings.append("é" * 129)),
    ("stop.token_ids", lambda r: r.stop.token_ids.extend(range(65))),
    ("stop.token_ids[1]", lambda r: r.stop.token_ids.extend([1, 300])),
    *(
        ("sampling.temperature", lambda r, v=v: setattr(r.sampling, "temperature", v))
        for v in (float("nan"), float("inf"), -float("inf"), -0.1, 100.5)
    ),
    *(
        ("sampling.top_p", lambda r, v=v: setattr(r.sampling, "top_p", v))
        for v in (float("nan"), float("inf"), 0.0, -0.5, 1.01)
    ),
    *(
        (f"sampling.{name}", lambda r, name=name, v=v: setattr(r.sampling, name, v))
        for name, values in {
            "min_p": (float("nan"), -0.1, 1.1),
            "repetition_penalty": (float("nan"), float("inf"), 0.0, 1e-40, 0.01, -1.0, 10.5),
            "presence_penalty": (float("nan"), -2.1, 2.1),
            "frequency_penalty": (float("nan"), -2.1, float("inf")),
        }.items()
        for v in values
    ),
    ("sampling.logit_bias[1].token_id", lambda r: add_biases(r, (1, 0.0), (300, 0.0))),
    ("sampling.logit_bias[1].token_id", lambda r: add_biases(r, (1, 0.0), (1, 0.0))),
    ("sampling.logit_bias[0].bias", lambda r: add_biases(r, (1, 100.5))),
    ("sampling.logit_bias[0].bias", lambda r: add_biases(r, (1, float("nan")))),
    ("sampling.logit_bias", lambda r: add_biases(r, *[(1, 0.0)] * 1025)),
    ("n", lambda r: setattr(r, "n", 0)),
    ("n", lambda r: setattr(r, "n", 17)),
    ("n", lambda r: (setattr(r, "n", 2), setattr(r.sampling, "temperature", 0.0))),
    ("prompt_logprobs", lambda r: setattr(r, "prompt_logprobs", 0)),
    ("prompt_logprobs", lambda r: (setattr(r, "echo", True), setattr(r, "prompt_logprobs", 21))),
    ("guide", lambda r: r.guide.SetInParent()),
    ("guide.json_object", lambda r: setattr(r.guide, "json_object", False)),
    ("guide.json_schema", lambda r: setattr(r.guide, "json_schema", "")),
    ("guide.regex", lambda r: setattr(r.guide, "regex", "é" * (1 << 14) + "x")),
    ("guide.choices.texts", lambda r: r.guide.choices.SetInParent()),
    ("guide.choices.texts", lambda r: r.guide.choices.texts.extend("x" * 257)),
    ("guide.choices.texts[1]", lambda r: r.guide.choices.texts.extend(["x", ""])),
    ("guide.choices", lambda r: r.guide.choices.texts.append("x" * (1 << 15))),
    ("stop.min_tokens", lambda r: (setattr(r.guide, "regex", "a"), set_stop(r, min_tokens=1))),
    ("stop.ignore_eos", lambda r: (setattr(r.guide, "regex", "a"), set_stop(r, ignore_eos=True))),
    ("sampling.top_k", lambda r: setattr(r.sampling, "top_k", 301)),
    ("logprobs", lambda r: setattr(r, "logprobs", 21)),
    ("request_id", lambda r: setattr(r, "request_id", "a b")),
    ("request_id", lambda r: setattr(r, "request_id", "x" * 129)),
    ("request_id", lambda r: setattr(r, "request_id", "ok\n")),
    ("tenant", lambda r: setattr(r, "tenant", "x" * 129)),
    ("model", lambda r: setattr(r, "model", "other")),
]


@pytest.mark.parametrize("case", range(len(EDITS)))
def test_refused_by_name(case: int) -> None:
    field, edit = EDITS[case]
    message = good()
    edit(message)
    payload = message.SerializeToString()
    began_s = time.thread_time()
    assert field_of(payload) == field
    assert time.thread_time() - began_s < 0.05


def test_what_is_far_too_long_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(codec, "_parse")
    assert field_of(pb.GenerateRequest(text="x" * 10_000_000)) == "text"
    many = pb.GenerateRequest(stop=pb.StopConditions(strings=["x"] * 100_000))
    assert field_of(many) == "stop"


BAD_UTF8 = b"ok\xff"
WIRE = [
    ("request_id", chunk(1, BAD_UTF8)),
    ("model", chunk(2, BAD_UTF8)),
    ("text", chunk(3, BAD_UTF8)),
    ("tenant", chunk(8, BAD_UTF8)),
    ("text", chunk(3, b"\xed\xa0\x80")),
    ("stop.strings[0]", chunk(3, b"hi") + chunk(6, chunk(3, BAD_UTF8))),
    ("stop.strings[2]", chunk(6, chunk(3, b"a") + chunk(3, b"b") + chunk(3, b"\xc3"))),
    ("text", b"\x1a\x7fshort"),
    ("stop.strings", chunk(6, b"\x1a\x7f")),
    ("token_ids.ids", chunk(4, chunk(1, b"\x01\x80"))),
    ("request", b"\x07"),
    ("request", b"\x00\x00"),
    ("request", chunk(3, b"hi") + b"\x98\x06\x01"),
    ("stop", chunk(3, b"hi") + chunk(6, b"\x48\x01")),
    ("sampling", chunk(3, b"hi") + chunk(5, b"\x78\x01")),
    ("token_ids", chunk(4, chunk(1, b"\x01") + b"\x10\x01")),
    # Known numbers with a value of another type.
    ("request_id", b"\x08\x01" + chunk(3, b"hi")),
    ("stop.max_tokens", chunk(3, b"hi") + chunk(6, chunk(1, b"xx"))),
    ("guide.regex", chunk(3, b"hi") + chunk(9, chunk(3, BAD_UTF8))),
    ("guide.choices", chunk(3, b"hi") + chunk(9, chunk(4, b"\x10\x01"))),
    ("sampling.min_p", chunk(3, b"hi") + chunk(5, b"\x28\x01")),
    ("sampling.logit_bias", chunk(3, b"hi") + chunk(5, chunk(9, b"\x18\x01"))),
]


@pytest.mark.parametrize("case", range(len(WIRE)))
def test_malformed_bytes_name_the_field(case: int) -> None:
    field, payload = WIRE[case]
    assert field_of(payload) == field


def test_unknown_numbers_are_named() -> None:
    with pytest.raises(InvalidRequest, match="stop: unknown field number 9"):
        parse(chunk(3, b"hi") + chunk(6, b"\x48\x01"))


def test_garbage_is_refused_and_nothing_else() -> None:
    seed = random.Random(20261123)
    sample = good()
    sample.stop.strings.extend(["abc", "de"])
    sample.sampling.temperature = 0.5
    valid = sample.SerializeToString()
    began_s = time.thread_time()
    for turn in range(20_000):
        if turn % 2:
            payload = seed.randbytes(seed.randrange(64))
        else:
            mutated = bytearray(valid)
            for _ in range(seed.randrange(1, 4)):
                mutated[seed.randrange(len(mutated))] = seed.randrange(256)
            payload = bytes(mutated)
        try:
            parse(payload)
        except InvalidRequest as error:
            assert error.field
    assert time.thread_time() - began_s < 10


def test_deep_and_long_garbage_is_quick() -> None:
    nested = b"x"
    for _ in range(200):
        nested = chunk(6, nested)
    shapes = (nested, b"\x33" * 50_000, b"\x0a\x00" * 50_000 + b"\xff", b"\xff" * 60_000)
    for payload in shapes:
        began_s = time.thread_time()
        field_of(payload)
        assert time.thread_time() - began_s < 0.2


def test_checking_takes_microseconds() -> None:
    payload = good().SerializeToString()
    began_s = time.thread_time()
    for _ in range(1000):
        codec.parse_generate(payload, LIMITS)
    # About 10 us each; of this thread's own time, so that a busy machine does not count.
    assert (time.thread_time() - began_s) / 1000 < 200e-6


@pytest.mark.parametrize(
    ("field", "num_prompt", "max_tokens", "min_tokens"),
    [
        ("text", 0, None, 0),
        ("text", 4096, None, 0),
        ("stop.max_tokens", 4000, 97, 0),
        ("stop.min_tokens", 4090, None, 7),
    ],
)
def test_refused_after_tokenising(
    field: str, num_prompt: int, max_tokens: int | None, min_tokens: int
) -> None:
    message = pb.GenerateRequest(text="x", stop=pb.StopConditions(min_tokens=min_tokens))
    if max_tokens is not None:
        message.stop.max_tokens = max_tokens
    client = parse(message)
    with pytest.raises(InvalidRequest) as caught:
        codec.complete_request(client, (1,) * num_prompt, LIMITS)
    assert caught.value.field == field


def test_salt_and_hints_arrive() -> None:
    message = good()
    message.tenant, message.cache_salt = "t1", "é" * 128
    message.snapshot_hints.extend([5, 1, 5])
    request = codec.complete_request(parse(message), (1,) * 5, LIMITS)
    assert request.cache_salt == "t1/" + "é" * 128
    assert request.snapshot_hints == (5, 1, 5)
    plain = codec.complete_request(parse(good()), (1,) * 5, LIMITS)
    assert plain.snapshot_hints == ()


def test_no_tenant_shares_with_another_whatever_its_salt() -> None:
    salts = set()
    pairs = [("", ""), ("", "a"), ("a", ""), ("a", "a"), ("", "a/"), ("a", "/a"), ("", "/a")]
    for tenant, salt in pairs:
        message = good()
        message.tenant, message.cache_salt = tenant, salt
        salts.add(codec.complete_request(parse(message), (1,), LIMITS).cache_salt)
    assert len(salts) == len(pairs)


def test_priority_and_session_arrive() -> None:
    message = good()
    message.priority, message.session_id = -100, "s" * 128
    request = codec.complete_request(parse(message), (1,), LIMITS)
    assert (request.priority, request.session) == (-100, "s" * 128)
    plain = codec.complete_request(parse(good()), (1,), LIMITS)
    assert (plain.priority, plain.session) == (0, "")


@pytest.mark.parametrize("priority", [-101, 101, 2**31 - 1, -(2**31)])
def test_a_priority_outside_the_range_is_named(priority: int) -> None:
    message = good()
    message.priority = priority
    assert field_of(message) == "priority"


@pytest.mark.parametrize("session", ["s" * 129, "a/b", "é"])
def test_a_session_of_other_characters_is_named(session: str) -> None:
    message = good()
    message.session_id = session
    assert field_of(message) == "session_id"


def test_a_long_salt_is_refused_by_its_bytes() -> None:
    message = good()
    message.cache_salt = "é" * 129
    assert field_of(message) == "cache_salt"


def test_many_hints_are_refused() -> None:
    message = good()
    message.snapshot_hints.extend([1] * 64)
    assert codec.complete_request(parse(message), (1,), LIMITS).snapshot_hints == (1,) * 64
    message.snapshot_hints.append(1)
    assert field_of(message) == "snapshot_hints"


@pytest.mark.parametrize("hint", [0, 6, 2**32 - 1])
def test_a_hint_outside_the_prompt_is_named(hint: int) -> None:
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 5), snapshot_hints=[1, hint])
    with pytest.raises(InvalidRequest) as caught:
        codec.complete_request(parse(message), (1,) * 5, LIMITS)
    assert caught.value.field == "snapshot_hints[1]"


def test_the_context_can_be_filled_exactly() -> None:
    message = good()
    message.stop.max_tokens = 96
    request = codec.complete_request(parse(message), (1,) * 4000, LIMITS)
    assert request.prompt_len + request.stop.max_tokens == LIMITS.max_context_tokens


def test_deltas_carry_logprobs_only_when_there_are_any() -> None:
    plain = answers.Delta(3, "ab", (SampledToken(1), SampledToken(2)))
    delta = pb.GenerateResponse.FromString(answers.delta_to_bytes(plain)).delta
    assert (delta.index, delta.text, list(delta.token_ids)) == (3, "ab", [1, 2])
    assert not delta.logprobs
    rich = SampledToken(1, -0.5, (TokenLogprob(1, -0.5), TokenLogprob(9, -2.0)))
    delta = pb.GenerateResponse.FromString(
        answers.delta_to_bytes(answers.Delta(0, "", (rich,)))
    ).delta
    assert [lp.logprob for lp in delta.logprobs] == [-0.5]
    assert [(t.token_id, t.logprob) for t in delta.logprobs[0].top] == [(1, -0.5), (9, -2.0)]


def test_completions_carry_every_field() -> None:
    completion = answers.Completion(
        request_id="r",
        finish_reason=FinishReason.STOP,
        matched_stop="END",
        seed=2**64 - 1,
        usage=answers.Usage(1, 2, 3, 4),
        timings=answers.Timings(1.0, 2.0, 3.0, 4.0, 5.0, 6, "ucx", 7.0, 8.0),
        prefill_worker="p@1",
        decode_worker="d@2",
        choice=3,
    )
    response = pb.GenerateResponse.FromString(answers.completion_to_bytes(completion))
    sent = {field.name for field, _ in response.completion.ListFields()}
    assert sent == set(pb.Completion.DESCRIPTOR.fields_by_name)
    for part in (response.completion.usage, response.completion.timings):
        assert len(part.ListFields()) == len(part.DESCRIPTOR.fields)


def test_models_carry_every_field() -> None:
    listing = answers.ModelListing("tiny", 1, 2, 3, 4, 5)
    [model] = pb.ListModelsResponse.FromString(answers.models_to_bytes([listing])).models
    assert len(model.ListFields()) == len(pb.Model.DESCRIPTOR.fields)
