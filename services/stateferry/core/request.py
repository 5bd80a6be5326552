"""A request as workers see it: token ids in, token ids out.

On a worker, ``request_id`` is the attempt's (``Ticket.attempt_id``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from stateferry.core.sampling import SamplingParams, StopConditions

MAX_CACHE_SALT_BYTES = 256
MAX_SNAPSHOT_HINTS = 64
MIN_PRIORITY, MAX_PRIORITY = -100, 100


def cache_salt_of(tenant: str, salt: str) -> str:
    """What keeps apart the cached state of tenants, and of what one tenant wants apart. A tenant's
    name holds no slash."""
    return f"{tenant}/{salt}"


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a decode worker knows of a request: not its prompt, which is folded into the state.

    ``seen_prompt_ids`` are the prompt's distinct ids, ascending, if a penalty looks at them, else
    empty. ``output_ids`` are output of this very request that another attempt gave. ``rules``
    belong to the worker's sampler, which made them; None for most requests.
    """

    request_id: str
    sampling: SamplingParams
    stop: StopConditions
    seen_prompt_ids: tuple[int, ...] = ()
    rules: object = field(default=None, compare=False)
    output_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Immutable input of one request. ``prompt_ids`` is never empty.

    ``prompt_logprobs`` None returns none; n those of each prompt token but the first, and of the n
    likeliest in its place. ``rules`` and ``scores`` belong to the worker's engine, which made them.

    The last ``num_output_ids`` of ``prompt_ids`` are output of this very request, which was
    preempted: it goes on with output token ``num_output_ids``. Nothing cached is shared between
    requests of different ``cache_salt``. ``snapshot_hints`` are positions in the prompt, up to its
    end, that later ones are expected to have in common with it. Of requests that wait, one of
    larger ``priority`` is next. ``session`` names a conversation of the tenant's, or nothing.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions
    prompt_logprobs: int | None = None
    rules: object = field(default=None, compare=False)
    scores: object = field(default=None, compare=False)
    cache_salt: str = ""
    snapshot_hints: tuple[int, ...] = ()
    num_output_ids: int = 0
    priority: int = 0
    session: str = ""

    @property
    def continuation(self) -> Continuation:
        """All but the prompt."""
        seen = self.seen_prompt_ids
        return Continuation(
            self.request_id, self.sampling, self.stop, seen, self.rules, self.output_ids
        )

    @property
    def output_ids(self) -> tuple[int, ...]:
        """Those of ``prompt_ids`` that are output of this very request."""
        return self.prompt_ids[self.prompt_len - self.num_output_ids :]

    def continued(self, output_ids: tuple[int, ...]) -> GenerationRequest:
        """To go on behind output that somebody has already. Of a request without such."""
        if not output_ids:
            return self
        return replace(
            self,
            prompt_ids=(*self.prompt_ids, *output_ids),
            num_output_ids=len(output_ids),
            prompt_logprobs=None,
            snapshot_hints=(),
        )

    @property
    def seen_prompt_ids(self) -> tuple[int, ...]:
        """As in Continuation."""
        looked_at = self.sampling.penalties.look_at_prompt
        return tuple(sorted(set(self.prompt_ids))) if looked_at else ()

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def total_tokens(self) -> int:
        """Prompt and output together, at most."""
        return self.prompt_len + self.stop.max_tokens - self.num_output_ids
