"""Several continuations of one request, and its prompt sent back, through a real router."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc

from router.fakes import FakeWorker, fake_cluster, first, handed_off, out
from router.scripts import (
    Events,
    ask,
    decode_hangs_after_some,
    decode_well,
    failure,
    prefill_well,
    text_of,
)
from stateferry.core.sampling import choice_seed
from stateferry.v1 import inference_pb2 as pb
from stateferry.v1 import worker_pb2


def several(n: int, **stop: Any) -> pb.GenerateRequest:
    request = ask(max_tokens=4, **stop)
    request.n = n
    request.sampling.seed = 11
    return request


async def test_each_choice_has_its_own_deltas_completion_and_seed() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        events = await cluster.call(several(3))
        ends = {e.completion.choice: e.completion for e in events if e.HasField("completion")}
        assert sorted(ends) == [0, 1, 2]
        assert [ends[c].seed for c in range(3)] == [choice_seed(11, c) for c in range(3)]
        assert len({ends[c].request_id for c in range(3)}) == 1
        for choice in range(3):
            mine = [e.delta for e in events if e.HasField("delta") and e.delta.choice == choice]
            assert [d.index for d in mine] == [0, 1, 2, 3]
            assert "".join(d.text for d in mine) == "ABCD"
        seeds = {r.sampling.seed for r in cluster.decode.requests}
        assert seeds == {choice_seed(11, c) for c in range(3)}
        assert {r.sampling.seed for r in cluster.prefill.requests} == seeds
        await cluster.assert_clean()


async def test_nothing_of_a_choice_comes_after_its_completion() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        ended: set[int] = set()
        for event in await cluster.call(several(8)):
            if event.HasField("completion"):
                assert event.completion.choice not in ended
                ended.add(event.completion.choice)
            else:
                assert event.delta.choice not in ended
        assert ended == set(range(8))


async def test_choices_wait_for_workers_one_by_one() -> None:
    async with fake_cluster(prefill_well, decode_well, capacity=1) as cluster:
        events = await cluster.call(several(5))
        assert Counter(e.HasField("completion") for e in events)[True] == 5
        await cluster.assert_clean()


async def test_a_choice_that_fails_ends_them_all() -> None:
    async def second_breaks(me: FakeWorker, request: Any, ticket: Any) -> Events:
        if request.sampling.seed == choice_seed(11, 1):
            await me.context.abort(grpc.StatusCode.DATA_LOSS, "broken")
        async for event in decode_hangs_after_some(me, request, ticket):
            yield event

    async with fake_cluster(prefill_well, second_breaks) as cluster:
        error = await asyncio.wait_for(failure(cluster, several(3)), 5)
        assert error.code() is grpc.StatusCode.DATA_LOSS
        await cluster.assert_clean()


async def test_a_client_that_leaves_ends_all_choices() -> None:
    async with fake_cluster(prefill_well, decode_hangs_after_some) as cluster:
        call = cluster.stub.Generate(several(4))
        await call.read()
        await cluster.until(lambda: cluster.decode.num_active == 4)
        assert cluster.router.admission.num_in_flight == 4
        call.cancel()
        await cluster.assert_clean()


async def test_choices_count_as_requests() -> None:
    async with fake_cluster(prefill_well, decode_hangs_after_some, max_requests=4) as cluster:
        error = await failure(cluster, several(5))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("n: ")
        running = cluster.stub.Generate(several(3))
        await cluster.until(lambda: cluster.router.admission.num_in_flight == 3)
        error = await failure(cluster, several(2))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        running.cancel()
        await cluster.assert_clean()


async def test_the_prompt_comes_back_before_the_first_delta() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        request = ask("héllo")
        request.echo = True
        events = await cluster.call(request)
        assert events[0].WhichOneof("event") == "prompt"
        prompt = events[0].prompt
        assert (prompt.index, prompt.text) == (0, "héllo")
        assert list(prompt.token_ids) == list("héllo".encode())
        assert not prompt.logprobs
        assert text_of(events[1:]) == "ABCDE"
        by_ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids="é".encode()), echo=True)
        by_ids.stop.max_tokens = 2
        assert (await cluster.call(by_ids))[0].prompt.text == "é"


async def test_a_long_prompt_comes_back_in_parts() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        request = ask("x" * 2500, max_tokens=1)
        request.echo = True
        parts = [e.prompt for e in await cluster.call(request) if e.HasField("prompt")]
        assert [(p.index, len(p.token_ids)) for p in parts] == [
            (0, 1024),
            (1024, 1024),
            (2048, 452),
        ]
        assert [len(p.text) for p in parts] == [2500, 0, 0]


def scored(index: int, ids: bytes) -> worker_pb2.PrefillEvent:
    part = worker_pb2.PromptTokens(index=index, tokens=[out(i) for i in ids])
    for place, token in enumerate(part.tokens, index):
        if place:
            token.logprob = -float(place)
            token.top.add(token_id=place, logprob=-0.5)
    return worker_pb2.PrefillEvent(prompt_tokens=part)


def scoring(*events: worker_pb2.PrefillEvent) -> Any:
    async def script(me: FakeWorker, request: Any, ticket: Any) -> Events:
        if request.HasField("prompt_logprobs"):
            for event in events:
                yield event
        yield first(ord("A"))
        me.sealed.set()
        yield handed_off()

    return script


def ask_for_scores(text: str = "abc", n: int = 1) -> pb.GenerateRequest:
    request = several(n)
    request.text = text
    request.echo = True
    request.prompt_logprobs = 1
    return request


async def test_a_scored_prompt_comes_back_once_with_its_scores() -> None:
    script = scoring(scored(0, b"a"), scored(1, b"bc"))
    async with fake_cluster(script, decode_well) as cluster:
        events = await cluster.call(ask_for_scores(n=2))
        [prompt] = [e.prompt for e in events if e.HasField("prompt")]
        assert (prompt.text, list(prompt.token_ids)) == ("abc", list(b"abc"))
        assert [entry.logprob for entry in prompt.logprobs] == [-1.0, -2.0]
        assert [entry.top[0].token_id for entry in prompt.logprobs] == [1, 2]
        asked = [r.HasField("prompt_logprobs") for r in cluster.prefill.requests]
        assert sorted(asked) == [False, True]
        await cluster.assert_clean()


async def test_scores_that_do_not_fit_the_prompt_are_not_passed_on() -> None:
    for events in (
        [scored(0, b"ab")],
        [scored(0, b"abcd")],
        [scored(0, b"abd")],
        [scored(0, b"a"), scored(2, b"c")],
        [scored(0, b"a"), scored(0, b"bc")],
    ):
        async with fake_cluster(scoring(*events), decode_well) as cluster:
            error = await failure(cluster, ask_for_scores())
            assert error.code() is grpc.StatusCode.INTERNAL
            await cluster.assert_clean()


async def test_a_guide_is_checked_before_any_worker_hears_of_it() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        bad = ask()
        bad.guide.json_schema = '{"type": "nothing"}'
        error = await failure(cluster, bad)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("guide.json_schema: ")
        assert cluster.prefill.requests == []
        fine = ask()
        fine.guide.regex = "[a-z]+"
        await cluster.call(fine)
        [request] = cluster.decode.requests
        assert (request.sampling.guide.kind, request.sampling.guide.source) == ("regex", "[a-z]+")
        assert request.sampling.guide == cluster.prefill.requests[0].sampling.guide
        await cluster.assert_clean()


async def test_prompt_ids_go_to_decode_only_for_a_penalty_that_needs_them() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        for field, value, expected in (
            ("presence_penalty", 1.0, []),
            ("frequency_penalty", 1.0, []),
            ("repetition_penalty", 1.5, sorted(b"helo")),
            ("repetition_penalty", 1.0, []),
        ):
            request = ask("hello")
            setattr(request.sampling, field, value)
            await cluster.call(request)
            assert list(cluster.decode.requests[-1].seen_prompt_ids) == expected
