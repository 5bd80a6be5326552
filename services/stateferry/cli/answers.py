"""Prints what a router answers: text as it comes, or one line of JSON per choice."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from stateferry.client import Completion, Delta, Event, PromptPart
from stateferry.local.terminal import printable


class TextAnswers:
    """For people. One choice is printed as it comes; several would mix, so each waits for its
    end."""

    def __init__(self, is_alone: bool) -> None:
        self._is_alone = is_alone
        self._texts: dict[int, str] = {}
        # A file or a pipe gets the text as it is.
        self._shown = printable if sys.stdout.isatty() else str

    def take(self, event: Event) -> None:
        """Print an event, or keep it."""
        match event:
            case Completion():
                if not self._is_alone:
                    print(f"--- choice {event.choice}")
                print(self._shown(self._texts.pop(event.choice, "")), flush=True)
                print(summary(event), file=sys.stderr)
            case _:
                choice = event.choice if isinstance(event, Delta) else 0
                if self._is_alone:
                    print(self._shown(event.text), end="", flush=True)
                else:
                    self._texts[choice] = self._texts.get(choice, "") + event.text


@dataclass(slots=True)
class _Gathered:
    """The tokens of a choice, or of the prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Any] = field(default_factory=list)

    def add(self, part: Delta | PromptPart) -> None:
        self.text += part.text
        self.token_ids += part.token_ids
        self.logprobs += part.logprobs
        self.top_logprobs += part.top_logprobs

    def as_dict(self) -> dict[str, Any]:
        """Log-probabilities only where there are some."""
        return {
            k: v for k, v in dataclasses.asdict(self).items() if v or k in ("text", "token_ids")
        }


class JsonAnswers:
    """For programs."""

    def __init__(self) -> None:
        self._choices: dict[int, _Gathered] = {}
        self._prompt = _Gathered()

    def take(self, event: Event) -> None:
        """Keep an event; print a choice that ends."""
        match event:
            case Delta():
                self._choices.setdefault(event.choice, _Gathered()).add(event)
            case PromptPart():
                self._prompt.add(event)
            case Completion():
                line = self._choices.pop(event.choice, _Gathered()).as_dict()
                if event.choice == 0 and self._prompt.token_ids:
                    line["prompt"] = self._prompt.as_dict()
                print(json.dumps(line | dataclasses.asdict(event)), flush=True)


def summary(completion: Completion) -> str:
    """How a request went, in one line."""
    times = completion.timings
    parts = [
        f"{completion.prompt_tokens} + {completion.completion_tokens} tokens",
        f"first token {times.ttft_s * 1e3:.0f} ms",
        f"{completion.tokens_per_s:.1f} tokens/s",
    ]
    if completion.prefix_tokens:
        parts.append(f"{completion.prefix_tokens} of the prompt from the cache")
    if times.transport:
        parts.append(
            f"hand-off {times.handoff_bytes / 1e6:.2f} MB in {times.handoff_s * 1e3:.1f} ms "
            f"over {times.transport}"
        )
    return f"[{', '.join(parts)}; {completion.finish_reason}]"
