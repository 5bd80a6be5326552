"""The command that continues a prompt."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from stateferry.cli.answers import JsonAnswers, TextAnswers
from stateferry.cli.calls import run_call
from stateferry.cli.options import AsJson, ConfigFile, RouterAddress, Settings, router_address
from stateferry.client import Client, GenerateOptions
from stateferry.core.errors import ConfigError

Option = typer.Option
Count: TypeAlias = int | None
Number: TypeAlias = float | None
Text: TypeAlias = str | None
Texts: TypeAlias = list[str] | None

# Options that are parameters of a request by the same name.
_SAME_NAME = (
    "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty presence_penalty "
    "frequency_penalty seed n include_stop ignore_eos logprobs echo prompt_logprobs json_object "
    "regex tenant cache_salt priority session_id"
).split()


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    router: RouterAddress = None,
    max_tokens: Annotated[Count, Option(min=1, help="Most tokens.")] = None,
    min_tokens: Annotated[Count, Option(min=0, help="Do not stop before so many.")] = None,
    temperature: Annotated[Number, Option(min=0.0, help="0 is greedy.")] = None,
    top_k: Annotated[Count, Option(min=0, help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[Number, Option(help="Nucleus, in (0, 1].")] = None,
    min_p: Annotated[Number, Option(help="Least share of the likeliest's probability.")] = None,
    repetition_penalty: Annotated[Number, Option(help="On tokens seen; 1 is none.")] = None,
    presence_penalty: Annotated[Number, Option(help="On tokens generated.")] = None,
    frequency_penalty: Annotated[Number, Option(help="On tokens, each time generated.")] = None,
    logit_bias: Annotated[Texts, Option(metavar="ID=BIAS", help="Repeatable.")] = None,
    seed: Annotated[Count, Option(min=0, help="Same seed, same tokens.")] = None,
    n: Annotated[Count, Option("--n", "-n", min=1, help="Continuations.")] = None,
    stop: Annotated[Texts, Option(help="Text that ends it; repeatable.")] = None,
    stop_token_id: Annotated[list[int] | None, Option(help="Repeatable.")] = None,
    include_stop: Annotated[bool, Option("--include-stop", help="Show what ended it.")] = False,
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Go on after the end.")] = False,
    special_tokens: Annotated[bool, Option("--special-tokens", help="Show them.")] = False,
    logprobs: Annotated[Count, Option(min=0, help="And of so many others; see --json.")] = None,
    echo: Annotated[bool, Option("--echo", help="Show the prompt as well.")] = False,
    prompt_logprobs: Annotated[Count, Option(min=0, help="Needs --echo; see --json.")] = None,
    json_schema: Annotated[Text, Option(help="JSON that fits it; @FILE reads it.")] = None,
    json_object: Annotated[bool, Option("--json-object", help="Any JSON object.")] = False,
    regex: Annotated[Text, Option(help="A text that it matches.")] = None,
    choice: Annotated[Texts, Option(help="One of these texts; repeatable.")] = None,
    grammar: Annotated[Text, Option(help="A text of it, in Lark's notation; @FILE.")] = None,
    tenant: Annotated[str, Option(help="Whose request it is.")] = "",
    cache_salt: Annotated[str, Option(help="Shares cached state with the same salt only.")] = "",
    snapshot_hint: Annotated[
        list[int] | None,
        Option(min=1, metavar="TOKENS", help="Where later prompts will part; repeatable."),
    ] = None,
    priority: Annotated[int, Option(help="Larger is sooner; -100 to 100.")] = 0,
    session_id: Annotated[str, Option("--session", help="Of one conversation's turns.")] = "",
    as_json: AsJson = False,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Continue a prompt, printing the text as it arrives; of several, each as it ends."""
    options = _options(context.params)
    address = router_address(router, file, settings)
    text = sys.stdin.read() if prompt == "-" else prompt
    run_call(_generate(address, text, options, as_json), address)


def _options(given: Mapping[str, Any]) -> GenerateOptions:
    return GenerateOptions(
        **{name: given[name] for name in _SAME_NAME},
        logit_bias=_biases(given["logit_bias"] or ()),
        stop=tuple(given["stop"] or ()),
        stop_token_ids=tuple(given["stop_token_id"] or ()),
        skip_special_tokens=False if given["special_tokens"] else None,
        json_schema=_text_or_file("--json-schema", given["json_schema"]),
        choices=tuple(given["choice"] or ()),
        grammar=_text_or_file("--grammar", given["grammar"]),
        snapshot_hints=tuple(given["snapshot_hint"] or ()),
    )


def _biases(entries: Sequence[str]) -> dict[int, float]:
    biases = {}
    for entry in entries:
        token_id, _, bias = entry.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise ConfigError("--logit-bias", f"{entry!r} is not ID=BIAS") from None
    return biases


def _text_or_file(flag: str, value: str | None) -> str | None:
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(flag, f"cannot read {value[1:]}: {error}") from error


async def _generate(address: str, prompt: str, options: GenerateOptions, as_json: bool) -> None:
    answers = JsonAnswers() if as_json else TextAnswers(is_alone=options.n in (None, 1))
    async with (
        Client(address) as client,
        contextlib.aclosing(client.generate(prompt, options)) as events,
    ):
        async for event in events:
            answers.take(event)
