"""`stateferry generate`: from options to a request, from events to what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stateferry.cli import generate as command
from stateferry.cli.answers import JsonAnswers, TextAnswers
from stateferry.cli.app import run
from stateferry.client import Completion, Delta, GenerateOptions, PromptPart, Timings

TIMINGS = Timings(0, 0, 0, 0, 0, 0, "", 0, 0)


def completion(choice: int) -> Completion:
    return Completion("r", "stop", 2, 3, 0, 0, 7 + choice, "", "p@1", "d@1", TIMINGS, choice)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[GenerateOptions]:
    """What the command would send."""
    seen: list[GenerateOptions] = []

    async def remember(address: str, prompt: str, options: GenerateOptions, as_json: bool) -> None:
        seen.append(options)

    monkeypatch.setattr(command, "_generate", remember)
    return seen


def test_every_option_reaches_the_request(asked: list[GenerateOptions], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    line = (
        "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-k 3 --top-p 0.75 --min-p 0.25 "
        "--repetition-penalty 1.5 --presence-penalty -0.5 --frequency-penalty 2 --seed 8 -n 3 "
        "--logit-bias 5=-1.5 --logit-bias 6=2 --stop a --stop b --stop-token-id 4 --include-stop "
        "--ignore-eos --special-tokens --logprobs 1 --echo --prompt-logprobs 0 --tenant t "
        "--cache-salt s --snapshot-hint 4 --snapshot-hint 9 --priority -3 "
        "--session chat-1"
    )
    assert run(["generate", "x", *line.split(), "--json-schema", f"@{schema}"]) == 0
    assert asked == [
        GenerateOptions(
            max_tokens=9,
            min_tokens=2,
            temperature=0.5,
            top_k=3,
            top_p=0.75,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=2.0,
            logit_bias={5: -1.5, 6: 2.0},
            seed=8,
            n=3,
            stop=("a", "b"),
            stop_token_ids=(4,),
            include_stop=True,
            ignore_eos=True,
            skip_special_tokens=False,
            logprobs=1,
            echo=True,
            prompt_logprobs=0,
            json_schema='{"type": "object"}',
            tenant="t",
            cache_salt="s",
            snapshot_hints=(4, 9),
            priority=-3,
            session_id="chat-1",
        )
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", GenerateOptions()),
        ("--json-object", GenerateOptions(json_object=True)),
        ("--regex [a-z]+", GenerateOptions(regex="[a-z]+")),
        ("--choice yes --choice no", GenerateOptions(choices=("yes", "no"))),
        ('--grammar start:"a"', GenerateOptions(grammar='start:"a"')),
    ],
)
def test_options_that_stand_alone(
    asked: list[GenerateOptions], line: str, expected: GenerateOptions
) -> None:
    assert run(["generate", "x", *line.split()]) == 0
    assert asked == [expected]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--logit-bias", "five=1"], "--logit-bias: 'five=1' is not ID=BIAS"),
        (["--logit-bias", "5"], "--logit-bias"),
        (["--json-schema", "@/nowhere.json"], "--json-schema: cannot read /nowhere.json"),
        (["--regex", "a", "--json-object"], "only one of"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "x", "--router", "127.0.0.1:1", *arguments]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert words in line


def test_one_choice_is_printed_as_it_comes(capfd: pytest.CaptureFixture[str]) -> None:
    answers = TextAnswers(is_alone=True)
    answers.take(PromptPart(0, "ab", (1,), (), ()))
    answers.take(Delta(0, "cd", (2,), ()))
    assert capfd.readouterr().out == "abcd"
    answers.take(completion(0))
    output, errors = capfd.readouterr()
    assert output == "\n" and "2 + 3 tokens" in errors


def test_several_choices_are_printed_as_they_end(capfd: pytest.CaptureFixture[str]) -> None:
    answers = TextAnswers(is_alone=False)
    for choice, text in ((0, "a"), (1, "x"), (0, "b"), (1, "y")):
        answers.take(Delta(0, text, (1,), (), choice=choice))
    answers.take(completion(1))
    answers.take(completion(0))
    assert capfd.readouterr().out == "--- choice 1\nxy\n--- choice 0\nab\n"


def test_json_has_a_line_per_choice(capfd: pytest.CaptureFixture[str]) -> None:
    answers = JsonAnswers()
    answers.take(PromptPart(0, "p", (9, 8), (-0.5,), (((8, -0.5),),)))
    answers.take(Delta(0, "a", (1,), (-1.0,), (((1, -1.0), (2, -2.0)),)))
    answers.take(Delta(1, "b", (2,), (-2.0,), ((),)))
    answers.take(Delta(0, "x", (3,), (), choice=1))
    answers.take(completion(1))
    answers.take(completion(0))
    second, first = map(json.loads, capfd.readouterr().out.splitlines())
    assert (second["choice"], second["text"], second["token_ids"]) == (1, "x", [3])
    assert "logprobs" not in second and "prompt" not in second
    assert (first["text"], first["logprobs"], first["seed"]) == ("ab", [-1.0, -2.0], 7)
    assert first["prompt"]["token_ids"] == [9, 8] and first["prompt"]["logprobs"] == [-0.5]
