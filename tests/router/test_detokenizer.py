"""Text of every kind of tokenizer, piece by piece: properties over random ids and random text."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from router.fakes import byte_tokenizer
from router.test_text import naive_cut
from stateferry.router.text import _WINDOW_MAX_TOKENS, Detokenizer, OutputText, TextRules, Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CORPUS = ["the cat sat on the mat", "a naïve café, 漢字 and 🎉", "don't stop; it's 12.5 %"] * 3
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def byte_level() -> Tokenizer:
    """GPT-2's kind, with tokens that end and begin inside characters."""
    merges = [("t", "h"), ("Ġ", "th"), ("ð", "Ł"), ("Ł", "İ"), ("æ", "¼"), ("¢", "å")]
    return byte_tokenizer(merges)


def byte_fallback() -> Tokenizer:
    """Llama's kind: pieces with a visible space, and bytes for what has no piece."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = [*"abcdehimnost.,", SPACE]
    merges = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, "a"), ("a", "t"), (SPACE, SPACE)]
    for piece in [*letters, *(left + right for left, right in merges)]:
        vocab.setdefault(piece, len(vocab))
    raw = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(raw)


def metaspace() -> Tokenizer:
    raw = tokenizers.Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>")
    raw.train_from_iterator(CORPUS, trainer)
    return Tokenizer(raw)


def word_piece() -> Tokenizer:
    """BERT's kind: no bytes, "##" inside words, spaces cleaned up before punctuation."""
    raw = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"])
    raw.train_from_iterator(CORPUS, trainer)
    return Tokenizer(raw)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
}
tokenizer_of = functools.cache(lambda kind: KINDS[kind]())


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer._tokenizer.encode(text, add_special_tokens=False).ids)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert len(detokenizer._window) <= 4 * _WINDOW_MAX_TOKENS
    return [*pieces, detokenizer.flush()]


TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="the cat漢字é🎉👩‍👧.,' ", max_size=120),
    st.text(alphabet="🎉漢", min_size=20, max_size=60),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(text=TEXTS, cut=st.floats(0.0, 1.0))
def test_real_text_adds_up_wherever_the_output_begins(kind: str, text: str, cut: float) -> None:
    tokenizer = tokenizer_of(kind)
    ids = encode(tokenizer, text)
    begin = int(cut * len(ids))
    whole = tokenizer.decode(ids)
    pieces = stream(tokenizer, ids[begin:], ids[:begin])
    if REPLACEMENT in whole:
        return
    # A prompt that ends inside a character is shown up to that character.
    ends = range(begin, max(begin - 4, -1), -1)
    before = next(t for end in ends if REPLACEMENT not in (t := tokenizer.decode(ids[:end])))
    assert "".join(pieces) == whole[len(before) :]
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "word_piece"])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data(), num_prompt=st.integers(0, 20))
def test_random_ids_add_up(kind: str, data: st.DataObject, num_prompt: int) -> None:
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=150))
    prompt, output = ids[:num_prompt], ids[num_prompt:]
    whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
    if before.endswith(REPLACEMENT):
        before = before[: len(before) - 3].rstrip(REPLACEMENT)
        output, prompt = ids, []
        before = ""
    assert "".join(stream(tokenizer, output, prompt)) == whole[len(before) :]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_bytes_of_a_fallback_never_show_half_a_character(data: st.DataObject) -> None:
    """Whatever is shown before the end is text, or comes from bytes that can never be text."""
    tokenizer = tokenizer_of("byte_fallback")
    ids = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), max_size=100))
    pieces = stream(tokenizer, ids, [])
    valid = "".join(pieces)
    assert len(valid) <= 3 * len(ids) + 3
    if REPLACEMENT not in tokenizer.decode(ids):
        assert valid == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("char", ["é", "漢", "🎉"])
def test_a_long_run_of_split_characters_comes_one_by_one(kind: str, char: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = encode(tokenizer, "a" + char * 40)
    pieces = [
        piece for piece in stream(tokenizer, ids, encode(tokenizer, "a " + char * 5)) if piece
    ]
    assert "".join(pieces).strip() == "a" + char * 40
    assert all(len(piece) <= 2 for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=TEXTS, data=st.data(), include=st.booleans())
def test_stop_strings_are_found_wherever_tokens_end(
    kind: str, text: str, data: st.DataObject, include: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = encode(tokenizer, text)
    whole = tokenizer.decode(ids)
    if len(whole) < 2:
        return
    begin = data.draw(st.integers(0, len(whole) - 1))
    size = data.draw(st.integers(1, 6))
    strings = [whole[begin : begin + size], "zzz"]
    shown, matched = "", None
    output = OutputText(tokenizer, [], TextRules(tuple(strings), include_stop=include))
    for token_id in ids:
        match = output.push(token_id)
        shown, matched = shown + match.text, match.matched
        if matched is not None:
            break
    else:
        match = output.finish()
        shown, matched = shown + match.text, match.matched
    expected, string = naive_cut(whole, strings)
    assert matched == string
    assert shown == (expected + (string or "") if include else expected)
