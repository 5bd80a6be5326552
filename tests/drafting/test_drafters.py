"""What is guessed, in which tree, and when it is worth a verification."""

from __future__ import annotations

import pytest

from stateferry.drafting.ngram import NgramDrafter
from stateferry.drafting.payoff import StepCost, Trust, lengths_that_pay
from stateferry.drafting.speculator import Speculating, Speculator
from stateferry.drafting.tree import NO_DRAFT, ROOT, DraftTree, chain, merged


def test_trees() -> None:
    assert chain((5, 6)) == DraftTree((5, 6), (ROOT, 0)) and chain((5, 6)).is_chain
    tree = merged([(5, 6, 7), (5, 8), (9,)], most=9)
    assert tree == DraftTree((5, 6, 7, 8, 9), (ROOT, 0, 1, 0, ROOT))
    assert not tree.is_chain and tree.depth == 3
    assert tree.first(3) == chain((5, 6, 7))
    assert len(merged([(5, 6, 7), (5, 8), (9,)], most=4)) == 4
    assert len(NO_DRAFT) == NO_DRAFT.depth == 0


def test_ngram_says_what_followed() -> None:
    drafter = NgramDrafter((1, 2, 3, 4, 5, 6, 1, 2, 3))
    assert drafter.match_length == 3
    assert drafter.propose(3) == chain((4, 5, 6))
    drafter.observe(4)
    assert drafter.match_length == 4 and drafter.propose(2) == chain((5, 6))
    drafter.observe(9)
    assert drafter.match_length == 0 and drafter.propose(3) == NO_DRAFT


def test_ngram_branches() -> None:
    """The longest match first, then what else followed."""
    said = (7, 1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 7, 1, 2, 3)
    drafter = NgramDrafter(said, paths=2)
    assert drafter.match_length == 4
    assert drafter.propose(5) == merged([(4, 8), (5, 9, 7)], most=5)
    assert NgramDrafter(said).propose(3) == chain((4, 8, 1))


def test_ngram_goes_round() -> None:
    """What is known ends before the guess does."""
    assert NgramDrafter((7, 8) * 4).propose(5) == chain((7, 8, 7, 8, 7))
    assert NgramDrafter((3,) * 9).propose(4) == chain((3,) * 4)


def test_two_tokens_are_too_little_to_go_by() -> None:
    assert NgramDrafter((1, 2, 3, 1, 2)).propose(4) == NO_DRAFT


def learnt(plain_s: float, first_row_s: float, row_s: float, sequences: int = 1) -> StepCost:
    cost = StepCost()
    for _ in range(50):
        cost.plain_ran(sequences, plain_s)
        for more in range(0, 12, 3):
            cost.verify_ran(sequences, sequences + more, first_row_s + row_s * more)
    return cost


def test_cost_is_learnt() -> None:
    cost = learnt(1e-3, 1.2e-3, 3e-4)
    assert cost.plain(1) == pytest.approx(1e-3)
    line = cost.line(1)
    assert line.base == pytest.approx(1.2e-3, rel=0.05)
    assert line.slope == pytest.approx(3e-4, rel=0.05)
    assert cost.plain(2) is None


def test_one_slow_step_changes_little() -> None:
    cost = learnt(1e-3, 1.2e-3, 3e-4)
    before = cost.line(1)
    cost.verify_ran(1, 5, 5.0)
    cost.plain_ran(1, 5.0)
    after = cost.line(1)
    assert after.base + 4 * after.slope < 1.1 * (before.base + 4 * before.slope)
    assert cost.plain(1) < 1.1e-3  # type: ignore[operator]


def test_what_is_not_tried_is_forgotten() -> None:
    """Or nobody would find out that it has become cheap."""
    cost = learnt(1e-3, 5e-3, 3e-3)
    assert cost.line(1).base > 4e-3
    for _ in range(500):
        cost.plain_ran(1, 1e-3)
    assert cost.line(1).base < 1.6e-3 and cost.line(1).slope < 5e-4


def test_trust_is_learnt_by_one_and_thought_of_others() -> None:
    everybody = Trust(first=(0.5, 0.9))
    one = Trust(behind=everybody)
    for _ in range(60):
        one.learn(0, right=0, was_wrong=True)
        one.learn(1, right=4, was_wrong=False)
    assert one.of(0) < 0.1 and one.of(1) > 0.95
    another = Trust(behind=everybody)
    assert another.of(0) < 0.15
    for _ in range(200):
        one.forget_some(0)
    assert one.of(0) < another.of(0) + 0.05


def test_lengths() -> None:
    cheap = learnt(1e-3, 1e-3, 1e-5)
    assert lengths_that_pay([0.95], [12], cheap) == [12]
    assert lengths_that_pay([0.95], [0], cheap) == [0]
    dear = learnt(1e-3, 1.3e-3, 6e-4)
    assert lengths_that_pay([0.3], [12], dear) == [0], "a guess that costs more than it gives"
    [some] = lengths_that_pay([0.7], [12], learnt(1e-3, 1e-3, 2e-4))
    assert 1 < some < 8
    assert lengths_that_pay([0.9], [12], StepCost()) == [0], "nothing to compare with yet"


def test_lengths_go_to_those_who_are_right() -> None:
    cost = learnt(1e-3, 1e-3, 1e-4, sequences=2)
    sure, unsure = lengths_that_pay([0.98, 0.4], [12, 12], cost)
    assert sure > unsure


def test_a_speculator_learns_that_guesses_do_not_pay() -> None:
    """Each step the text repeats itself, and goes on otherwise."""
    speculator = Speculator(4)
    speculator.begin("a", (1, 2, 3) * 20)
    speculator.plain_ran(1, 1e-3)
    verified, last = [], 1
    for step in range(300):
        drafts = speculator.drafts([Speculating("a", last, 100)])
        verified.append(drafts is not None)
        if drafts is None:
            speculator.plain_ran(1, 1e-3)
        else:
            speculator.verify_ran(1, 1 + len(drafts[0]), 1e-3 + 3e-4 * len(drafts[0]))
        # Never what was guessed, but the beginning of something that was said.
        last = 1 + step % 3 if step % 2 else 50 + step % 7
        speculator.observe("a", [last])
    assert any(verified[:60]) and sum(verified[150:]) < 20
    speculator.end("a")
    assert not speculator._sequences


def test_who_ended_meanwhile_is_not_observed() -> None:
    speculator = Speculator(4)
    speculator.begin("a", (1, 2))
    speculator.drafts([Speculating("a", 1, 10)])
    speculator.end("a")
    speculator.observe("a", [5])
    assert not speculator._sequences and not speculator._histories
