"""What a client asks of sampling, through three processes and a hand-off."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from stateferry.client import Client, Completion, Delta, GenerateOptions, PromptPart
from stateferry.config import load_config
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import Penalties, SamplingParams, StopConditions, choice_seed
from stateferry.local import LocalCluster
from support.local_engine import local_engine
from support.pools import wait_until_idle
from support.tiny_model import EOS_ID

EOS = frozenset({EOS_ID})


@dataclass
class Answer:
    """What came back of one choice, and of the prompt."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Any] = field(default_factory=list)
    end: Completion | None = None
    prompt: list[PromptPart] = field(default_factory=list)


async def ask(client: Client, prompt: Any, options: GenerateOptions) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    async for event in client.generate(prompt, options):
        answer = answers.setdefault(getattr(event, "choice", 0), Answer())
        match event:
            case Delta():
                assert event.index == len(answer.ids) and answer.end is None
                answer.text += event.text
                answer.ids += event.token_ids
                answer.logprobs += event.logprobs
                answer.top += event.top_logprobs
            case PromptPart():
                assert not answer.ids
                answer.prompt.append(event)
            case Completion():
                answer.end = event
    assert all(answer.end is not None for answer in answers.values())
    return answers


def random_sampling(rng: random.Random) -> SamplingParams:
    """Numbers that single precision holds exactly: the wire must not change what is compared."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.75, 1.5]),
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 0.875]),
        seed=rng.getrandbits(64),
        logprobs=rng.choice([0, 3]),
        min_p=rng.choice([0.0, 0.03125]),
        penalties=Penalties(
            rng.choice([1.0, 1.25]), rng.choice([0.0, 0.5]), rng.choice([0.0, 0.25, -0.5])
        ),
        logit_bias=((rng.randrange(3, 259), 4.0),) if rng.random() < 0.3 else (),
    )


def options_of(request: GenerationRequest, **more: Any) -> GenerateOptions:
    sampling = request.sampling
    return GenerateOptions(
        max_tokens=request.stop.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.penalties.repetition,
        presence_penalty=sampling.penalties.presence,
        frequency_penalty=sampling.penalties.frequency,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        timeout_s=60,
        **more,
    )


def random_requests(count: int, seed: int) -> list[GenerationRequest]:
    rng = random.Random(seed)
    return [
        GenerationRequest(
            request_id=f"sampling-{seed}-{number}",
            prompt_ids=tuple(rng.randrange(3, 259) for _ in range(rng.randint(1, 150))),
            sampling=random_sampling(rng),
            stop=StopConditions(rng.choice([1, 9, 30]), 0, EOS),
        )
        for number in range(count)
    ]


async def test_every_way_of_choosing_agrees_with_one_process(
    cluster: LocalCluster, tiny_model: Path
) -> None:
    """Penalties among them, which must know the prompt, and token 0, on the decode worker."""
    requests = random_requests(80, seed=21)
    engine, _ = local_engine(tiny_model)
    expected = await asyncio.to_thread(engine.generate, requests)
    gate = asyncio.Semaphore(12)
    async with Client(cluster.router_address) as client:

        async def check(request: GenerationRequest) -> None:
            async with gate:
                [answer] = (await ask(client, request.prompt_ids, options_of(request))).values()
            output = expected[request.request_id]
            assert answer.ids == output.token_ids
            assert answer.logprobs == [token.logprob for token in output.tokens]
            tops = [tuple((t.token_id, t.logprob) for t in token.top) for token in output.tokens]
            assert answer.top == tops

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(check(request))
        await wait_until_idle(client, within_s=2)
    changed = [r for r in requests if r.sampling.penalties.look_at_output]
    assert len(changed) > 40 and sum(r.stop.max_tokens > 1 for r in changed) > 20


async def test_choices_are_the_single_requests_of_their_seeds(cluster: LocalCluster) -> None:
    options = GenerateOptions(max_tokens=24, temperature=1.0, seed=99, n=3, frequency_penalty=0.5)
    async with Client(cluster.router_address) as client:
        together = await ask(client, "Once upon a time", options)
        assert sorted(together) == [0, 1, 2]
        for choice, answer in together.items():
            seed = choice_seed(99, choice)
            single = dataclasses.replace(options, n=None, seed=seed)
            [alone] = (await ask(client, "Once upon a time", single)).values()
            assert (alone.ids, alone.text) == (answer.ids, answer.text)
            assert answer.end is not None and answer.end.seed == seed
        assert len({tuple(answer.ids) for answer in together.values()}) == 3
        await wait_until_idle(client, within_s=2)


async def test_echo_scores_the_prompt_like_one_process(
    cluster: LocalCluster, tiny_model: Path
) -> None:
    [request, longer] = random_requests(2, seed=31)
    # Longer than the workers' budget of one step, so that scores come from several.
    longer = dataclasses.replace(longer, prompt_ids=(*longer.prompt_ids, *range(3, 250)))
    engine, _ = local_engine(tiny_model)
    async with Client(cluster.router_address) as client:
        for plain in (request, longer):
            asked = dataclasses.replace(plain, prompt_logprobs=2)
            expected = engine.generate([asked])[asked.request_id]
            options = options_of(asked, echo=True, prompt_logprobs=2)
            [answer] = (await ask(client, asked.prompt_ids, options)).values()
            assert answer.ids == expected.token_ids
            [part] = answer.prompt
            assert part.token_ids == asked.prompt_ids
            assert list(part.logprobs) == [token.logprob for token in expected.prompt[1:]]
            assert [[i for i, _ in top] for top in part.top_logprobs] == [
                [t.token_id for t in token.top] for token in expected.prompt[1:]
            ]
            # The prompt's text goes on in the output's.
            unscored = dataclasses.replace(options, prompt_logprobs=None)
            [again] = (await ask(client, asked.prompt_ids, unscored)).values()
            assert again.ids == answer.ids and again.prompt[0].logprobs == ()


async def test_prompt_scores_are_what_sampling_would_have_said(cluster: LocalCluster) -> None:
    """The score of a prompt's last token is that of the same token when it is generated."""
    async with Client(cluster.router_address) as client:
        greedy = GenerateOptions(max_tokens=5, temperature=0.0, logprobs=2, ignore_eos=True)
        [said] = (await ask(client, "A prompt, then", greedy)).values()
        prompt = [*(3 + b for b in b"any")]
        [start] = (await ask(client, prompt, greedy)).values()
        scored = GenerateOptions(
            max_tokens=1, temperature=0.0, echo=True, prompt_logprobs=2, ignore_eos=True
        )
        [echo] = (await ask(client, [*prompt, *start.ids], scored)).values()
        [part] = echo.prompt
        assert list(part.logprobs[-5:]) == pytest.approx(start.logprobs, abs=1e-5)
        assert said.ids


async def test_stop_strings_inside_tokens_and_what_stays(cluster: LocalCluster) -> None:
    async with Client(cluster.router_address) as client:
        options = GenerateOptions(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
        [whole] = (await ask(client, "x", options)).values()
        middle = len(whole.text) // 2
        string = whole.text[middle : middle + 3]
        begin = whole.text.index(string)
        for include in (False, True):
            stopping = dataclasses.replace(options, stop=(string,), include_stop=include)
            [cut] = (await ask(client, "x", stopping)).values()
            assert cut.text == whole.text[: begin + len(string) * include]
            assert cut.ids == whole.ids[: len(cut.ids)]
            assert cut.end is not None and cut.end.matched_stop == string
        await wait_until_idle(client, within_s=2)


async def test_a_bad_guide_is_refused_by_name(cluster: LocalCluster) -> None:
    async with Client(cluster.router_address) as client:
        for name, value in (("json_schema", '{"type": 1}'), ("regex", "("), ("grammar", "a: b")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(client, "x", GenerateOptions(**{name: value}))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (caught.value.details() or "").startswith(f"guide.{name}: ")
        with pytest.raises(ValueError, match="only one of"):
            await ask(client, "x", GenerateOptions(regex="a", json_object=True))


async def test_guided_bytes_of_a_random_model(cluster: LocalCluster) -> None:
    """Token 0 from prefill, the rest from decode: one text of the wanted form."""
    pattern = r"[a-c]{2,4}-[0-9]{1,3}"
    async with Client(cluster.router_address) as client:
        for seed in range(8):
            options = GenerateOptions(max_tokens=40, seed=seed, regex=pattern)
            [answer] = (await ask(client, "x", options)).values()
            assert re.fullmatch(pattern, answer.text)
            assert answer.ids[-1] == EOS_ID
            options = GenerateOptions(max_tokens=40, seed=seed, choices=("yes", "no", "né"))
            [answer] = (await ask(client, "x", options)).values()
            assert answer.text in ("yes", "no", "né")


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
    {
        "type": "object",
        "properties": {
            "ok": {"type": "boolean"},
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": -12, "maximum": 7}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
        "required": ["ok", "point"],
        "additionalProperties": False,
    },
]


def check_json(schema: dict[str, Any], value: Any) -> None:
    """The part of JSON schema that SCHEMAS use."""
    kind = schema.get("type")
    if "enum" in schema:
        assert value in schema["enum"]
    elif kind == "object":
        assert sorted(value) == sorted(schema["required"])
        for name, inner in schema["properties"].items():
            check_json(inner, value[name])
    elif kind == "array":
        assert schema["minItems"] <= len(value) <= schema["maxItems"]
        for item in value:
            check_json(schema["items"], item)
    elif kind == "string":
        assert isinstance(value, str) and len(value) <= schema["maxLength"]
    elif kind == "boolean":
        assert type(value) is bool
    else:
        assert type(value) is int
        assert schema["minimum"] <= value <= schema["maximum"]


@pytest.fixture(scope="module")
def bundled_cluster() -> Iterator[LocalCluster]:
    config = load_config(overrides={"router.port": 0}, environ={})
    with LocalCluster(config) as running:
        yield running
        assert running.deaths == ()


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
async def test_json_of_the_bundled_model(bundled_cluster: LocalCluster, number: int) -> None:
    schema = SCHEMAS[number]
    async with Client(bundled_cluster.router_address) as client:

        async def check(seed: int) -> None:
            options = GenerateOptions(
                max_tokens=200,
                temperature=seed % 3 / 2,
                seed=seed,
                frequency_penalty=0.25,
                json_schema=json.dumps(schema),
            )
            [answer] = (await ask(client, "Their data as JSON:", options)).values()
            assert answer.end is not None and answer.end.finish_reason == "stop"
            check_json(schema, json.loads(answer.text))

        await asyncio.gather(*map(check, range(9)))
        await wait_until_idle(client, within_s=2)
