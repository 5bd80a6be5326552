"""Outputs of a given form, whatever the logits say: guides, their limits and their replay."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from stateferry.core.errors import GuideBroke, InvalidRequest, InvariantViolation
from stateferry.core.guide import ANY_JSON_OBJECT, Guide, GuideKind
from stateferry.core.sampling import Penalties, SamplingParams
from stateferry.engine.forward_batch import SampleSpec
from stateferry.engine.rules import RulesMaker, why_no_token
from stateferry.engine.sampler import sample
from stateferry.guided.compiler import GuideCompiler

EOS = 2
VOCAB = 300  # Some ids beyond the tokenizer's, as padded models have them.


def byte_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Three specials, all bytes, and tokens that straddle JSON's punctuation."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": EOS}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    merges = [('"', ":"), ('"', "}"), ("1", "2"), (",", "Ġ"), ('":', "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizers.Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(folder), folder / "tokenizer.json"


@pytest.fixture(scope="module")
def compiler(tokenizer: tuple[tokenizers.Tokenizer, Path]) -> GuideCompiler:
    return GuideCompiler(tokenizer[1], VOCAB, frozenset({EOS}))


def generate(
    compiler: GuideCompiler,
    guide: Guide,
    seed: int,
    *,
    temperature: float = 1.0,
    moves_at: int = -1,
    max_tokens: int = 400,
) -> list[int]:
    """Ids up to the end of sequence. Logits are noise with a liking for closing what is open.

    At token ``moves_at`` another "worker" takes over, which replays what there is.
    """
    params = SamplingParams(temperature, 0, 1.0, seed, None, guide=guide)
    noise = torch.Generator().manual_seed(seed)
    rules = RulesMaker(compiler).make(params, ())
    ids: list[int] = []
    while len(ids) < max_tokens:
        if len(ids) == moves_at:
            rules = RulesMaker(compiler).make(params, ())
            assert rules is not None
            for index, token_id in enumerate(ids):
                rules.observe(index, token_id)
        logits = torch.randn(1, VOCAB, generator=noise) * 2
        logits[0, 3 + ord('"') - ord("!") + 0 : 3 + 3] += 4.0
        logits[0, EOS] += 4.0
        [token] = sample(logits, [SampleSpec(params, len(ids), rules=rules)])
        assert token is not None
        if token.token_id == EOS:
            return ids
        ids.append(token.token_id)
    raise AssertionError("the guided output did not end")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(25))
def test_json_of_a_schema(
    seed: int, compiler: GuideCompiler, tokenizer: tuple[tokenizers.Tokenizer, Path]
) -> None:
    guide = Guide(GuideKind.JSON_SCHEMA, json.dumps(PERSON))
    text = tokenizer[0].decode(generate(compiler, guide, seed, temperature=seed % 3 / 2))
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"a", "b"} and len(value["tags"]) <= 3


@pytest.mark.parametrize("seed", range(10))
def test_expressions_choices_and_grammars(
    seed: int, compiler: GuideCompiler, tokenizer: tuple[tokenizers.Tokenizer, Path]
) -> None:
    def text(kind: GuideKind, source: str) -> str:
        return str(tokenizer[0].decode(generate(compiler, Guide(kind, source), seed)))

    pattern = r"[0-9]{3}-[a-fé]{1,5}"
    assert re.fullmatch(pattern, text(GuideKind.REGEX, pattern))
    choices = ["yes", "no", 'a "quoted"\nline', "é", "yesterday"]
    assert text(GuideKind.CHOICES, json.dumps(choices)) in choices
    nested = text(GuideKind.GRAMMAR, 'start: "(" start? ")"')
    assert nested and nested == "(" * (len(nested) // 2) + ")" * (len(nested) // 2)


@pytest.mark.parametrize("moves_at", [1, 2, 9])
def test_another_worker_continues_with_the_same_tokens(
    moves_at: int, compiler: GuideCompiler
) -> None:
    guide = Guide(GuideKind.JSON_SCHEMA, json.dumps(PERSON))
    for seed in range(5):
        assert generate(compiler, guide, seed, moves_at=moves_at) == generate(compiler, guide, seed)


BAD = {
    GuideKind.JSON_SCHEMA: [
        "{",
        "[1]",
        '{"type": "nothing"}',
        '{"$ref": "http://localhost/schema"}',
        '{"$ref": "#"}',
        '{"not": {}}',
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"type":"object","properties":{"a":false},"required":["a"]}',
    ],
    GuideKind.REGEX: ["[", "(?=a)b", r"(a)\1", "(" * 15_000 + ")" * 15_000],
    GuideKind.GRAMMAR: ["start: foo", "a: b", "%%%", "start: " + "(" * 15_000 + '"a"'],
    GuideKind.CHOICES: ["[", "[]", "{}"],
}


@pytest.mark.parametrize(
    ("kind", "case"), [(k, c) for k, cs in BAD.items() for c in range(len(cs))]
)
def test_a_bad_guide_is_refused_by_name(
    kind: GuideKind, case: int, compiler: GuideCompiler
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.matcher(Guide(kind, BAD[kind][case]))
    assert caught.value.field == f"guide.{kind.value}"
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["((a{1000}){1000}){1000}", "(.*a.{0,500}){50}", "(a|b)*a(a|b){2000}", "a" * 32_000]
)
def test_a_hard_guide_takes_little_time_whether_refused_or_not(
    source: str, compiler: GuideCompiler
) -> None:
    began_s = time.process_time()
    try:
        compiler.matcher(Guide(GuideKind.REGEX, source))
    except InvalidRequest as error:
        assert error.field == "guide.regex"
    assert time.process_time() - began_s < 3.0


def test_a_guide_is_compiled_once(
    tokenizer: tuple[tokenizers.Tokenizer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GuideCompiler(tokenizer[1], VOCAB, frozenset({EOS}))
    compiled: list[Guide] = []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda g: (compiled.append(g), compile_one(g))[1])
    threads = [threading.Thread(target=compiler.matcher, args=(ANY_JSON_OBJECT,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == [ANY_JSON_OBJECT]
    for number in range(70):
        compiler.matcher(Guide(GuideKind.REGEX, str(number)))
    # The oldest made room.
    compiler.matcher(ANY_JSON_OBJECT)
    assert compiled.count(ANY_JSON_OBJECT) == 2 and len(compiler._compiled) == 64


def test_matchers_do_not_share_their_place(compiler: GuideCompiler) -> None:
    guide = Guide(GuideKind.CHOICES, '["ab", "ba"]')
    first, second = compiler.matcher(guide), compiler.matcher(guide)
    start = second.allowed().copy()
    first.advance(int(start.nonzero()[0][0]))
    assert (second.allowed() == start).all()
    assert (first.allowed() != start).any()


def test_what_cannot_be_guided_says_so(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    endless = GuideCompiler(tmp_path / "tokenizer.json", VOCAB, frozenset())
    with pytest.raises(InvalidRequest, match="guide: this model has no end-of-sequence"):
        endless.matcher(ANY_JSON_OBJECT)
    (tmp_path / "tokenizer.json").write_text("{}")
    broken = GuideCompiler(tmp_path / "tokenizer.json", VOCAB, frozenset({EOS}))
    with pytest.raises(InvalidRequest, match="guide: not with this tokenizer"):
        broken.matcher(ANY_JSON_OBJECT)


def test_the_tokenizer_is_read_before_anybody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer(tmp_path)
    early = GuideCompiler(tmp_path / "tokenizer.json", VOCAB, frozenset({EOS}))
    early.load()
    broken = GuideCompiler(tmp_path / "absent.json", VOCAB, frozenset({EOS}))
    broken.load()
    # Nothing is left to read for the first guide, nor is what failed tried again.
    monkeypatch.setattr("stateferry.guided.compiler.LLTokenizer", None)
    early.matcher(ANY_JSON_OBJECT)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"guide: not with this tokenizer: .*absent"):
            broken.matcher(ANY_JSON_OBJECT)


def test_a_guide_that_breaks_hurts_its_own_row_only(compiler: GuideCompiler) -> None:
    params = SamplingParams(0.0, 0, 1.0, 0, None, guide=Guide(GuideKind.REGEX, "ab"))
    rules = RulesMaker(compiler).make(params, ())
    plain = SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), 0)
    tokens = sample(torch.zeros(2, VOCAB), [SampleSpec(params, 3, rules=rules), plain])
    assert [token is None for token in tokens] == [True, False]
    assert isinstance(why_no_token(rules), InvariantViolation)


def test_a_guide_that_no_first_token_survives_is_refused_at_once(compiler: GuideCompiler) -> None:
    """Its first mask is within the limits; what follows any token is not."""
    wide = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(900)}}
    with pytest.raises(InvalidRequest, match=r"guide\.json_schema: .*too complex"):
        compiler.matcher(Guide(GuideKind.JSON_SCHEMA, json.dumps(wide)))


def test_a_guide_that_meets_a_limit_later_says_so(compiler: GuideCompiler) -> None:
    """Not as a bug of ours, and not as one of the model's."""
    guide = Guide(GuideKind.REGEX, "(.{1,1000}){1,1000}")
    params = SamplingParams(0.0, 0, 1.0, 0, None, guide=guide)
    rules = RulesMaker(compiler).make(params, ())
    plain = SamplingParams(0.0, 0, 1.0, 0, None)
    logits = torch.zeros(2, VOCAB)
    logits[0, EOS + 1] = 5.0
    for index in range(100):
        specs = [SampleSpec(params, index, rules=rules), SampleSpec(plain, index)]
        broken, other = sample(logits, specs)
        assert other is not None
        if broken is None:
            break
    failure = why_no_token(rules)
    assert isinstance(failure, GuideBroke) and "<" not in str(failure)
    assert isinstance(why_no_token(None), InvariantViolation)


@pytest.mark.parametrize("repetition", [1 / 64, 10.0])
def test_the_strongest_penalties_leave_numbers_to_choose_from(repetition: float) -> None:
    params = SamplingParams(1.0, 0, 0.9, 3, 1, penalties=Penalties(repetition, -2.0, 2.0))
    rules = RulesMaker(None).make(params, range(VOCAB))  # type: ignore[arg-type]
    for index in range(20):
        logits = torch.linspace(-1e4, 1e4, VOCAB)[None]
        [token] = sample(logits, [SampleSpec(params, index, rules=rules)])
        assert token is not None
