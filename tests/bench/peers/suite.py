"""One model in one dtype: all contenders loaded, then case by case in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.kernels.measure import Mismatch, Times
from bench.peers.cases import Case
from bench.peers.contenders import LLAMA, OURS, PEERS, TRANSFORMERS, Contender, Failed, Sample

# Compared before anything is timed: short, and long enough to have left the prompt.
CHECK = Case("check", "check", 2, 40, 8)

# Times the predicted seconds of the fastest peer.
_FAR_BEHIND = 3.0
# Whoever takes that long needs no second look.
_SLOW_S = 30.0

Open = Callable[[], Contender]


@dataclass(frozen=True)
class Row:
    """Tokens/s by contender, of medians. ``ratio`` is that of ours to the best peer: the median of
    the rounds' ratios, None without a peer."""

    model: str
    dtype: str
    case: str
    rates: Mapping[str, float]
    best: str | None
    ratio: float | None
    ceiling: float
    # Rates of a short look only, by contenders too slow for more.
    glimpsed: frozenset[str] = frozenset()

    @property
    def ours(self) -> float:
        return self.rates[OURS]


@dataclass
class Group:
    """Contenders of one model and dtype. ``absent`` says why somebody does not take part."""

    present: dict[str, Contender] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        for contender in self.present.values():
            contender.close()


def open_group(openers: Mapping[str, Open], absent: Mapping[str, str]) -> Group:
    """Load one after the other. Raises Failed if ours does not load."""
    group = Group(absent=dict(absent))
    try:
        for name, opener in openers.items():
            try:
                group.present[name] = opener()
            except Failed as error:
                if name == OURS:
                    raise
                group.absent[name] = str(error)
    except BaseException:
        group.close()
        raise
    return group


def check_tokens(group: Group, dtype: str) -> None:
    """The same greedy tokens, where rounding cannot be the reason for others. Raises Mismatch for
    ours; a peer that differs from transformers is left out."""
    if dtype != "float32":
        return
    samples: dict[str, Sample] = {}
    for name in list(group.present):
        sampled = _sample_or_leave(group, name, CHECK, seed=0)
        if sampled is not None and name != LLAMA:
            samples[name] = sampled
    wanted = samples.get(TRANSFORMERS)
    for name, sampled in samples.items():
        if wanted is None or sampled.tokens == wanted.tokens:
            continue
        if name == OURS:
            raise Mismatch(f"ours {sampled.tokens}, {TRANSFORMERS} {wanted.tokens}")
        group.present.pop(name).close()
        group.absent[name] = f"other greedy tokens than {TRANSFORMERS}"


@dataclass(frozen=True)
class Measured:
    """Seconds per token by contender and round. Of those in ``glimpsed`` there is only a short
    look: all of it would have taken too long."""

    times: Times
    glimpsed: frozenset[str]


def measure(group: Group, case: Case, rounds: int, limit_s: float = 15.0) -> Measured:
    """In turns, in alternating order, after a short one that warms up and tells who is slow: far
    behind the fastest peer, one round is enough; longer than ``limit_s`` a round, none."""
    predicted, seconds = _glimpse(group, case)
    fastest = min((s for name, s in predicted.items() if name != OURS), default=0.0)
    turns = {
        name: 0 if s > limit_s else 1 if s > _FAR_BEHIND * fastest and name != OURS else rounds
        for name, s in predicted.items()
    }
    turns[OURS] = rounds
    glimpsed = {name for name, number in turns.items() if not number}
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        names = [name for name in turns if turns[name] > number and name in group.present]
        for name in names if number % 2 == 0 else reversed(names):
            sampled = _sample_or_leave(group, name, case, seed=number)
            if sampled is not None:
                taken[name].append(sampled.seconds_per_token(case))
    taken |= {name: [seconds[name]] for name in glimpsed}
    whole = {name: list_ for name, list_ in taken.items() if name in group.present}
    return Measured(Times(whole), frozenset(glimpsed))


def _glimpse(group: Group, case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """By contender: how long the case will take, and seconds per token of a shortened one."""
    predicted, seconds = {}, {}
    short = case.shortened
    for name in list(group.present):
        for seed in (1001, 1002):
            sampled = _sample_or_leave(group, name, short, seed)
            if sampled is None:
                break
            predicted[name] = sampled.predicted_s(short, case)
            seconds[name] = sampled.seconds_per_token(short)
            if predicted[name] > _SLOW_S:
                break
    present = {name: value for name, value in predicted.items() if name in group.present}
    return present, seconds


def row_of(model: str, dtype: str, case: Case, measured: Measured, ceiling: float) -> Row:
    times = measured.times
    peers = [name for name in PEERS if name in times.seconds]
    best = times.fastest(peers) if peers else None
    return Row(
        model,
        dtype,
        case.name,
        {name: 1 / times.median(name) for name in times.seconds},
        best,
        _ratio(times, best, measured.glimpsed) if best else None,
        ceiling,
        measured.glimpsed,
    )


def _ratio(times: Times, best: str, glimpsed: frozenset[str]) -> float:
    if best in glimpsed or len(times.seconds[best]) != len(times.seconds[OURS]):
        return times.median(best) / times.median(OURS)
    return times.speedup(OURS, best)


def geometric_mean(ratios: Sequence[float]) -> float | None:
    return statistics.geometric_mean(ratios) if ratios else None


def _sample_or_leave(group: Group, name: str, case: Case, seed: int) -> Sample | None:
    """None when a peer failed, which then takes part no more. Raises Failed for ours."""
    try:
        return group.present[name].sample(case, seed)
    except Failed as error:
        if name == OURS:
            raise
        group.present.pop(name).close()
        group.absent[name] = f"{case.name}: {error}"
        return None
