"""Text comes out whole, in time, and cut where a stop string says."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

from router.fakes import EOS, byte_tokenizer
from stateferry.core.errors import ModelError
from stateferry.router.stop_strings import StopMatcher
from stateferry.router.text import _WINDOW_MAX_TOKENS, Detokenizer, OutputText, TextRules, Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SAMPLE = "né 漢字 👩‍👩‍👧 text, and more of it: naïve 🎉🎉 done. "


def metaspace_tokenizer() -> Tokenizer:
    """Like sentencepiece: a space belongs to the word after it, and vanishes at the beginning."""
    words = ["\N{LOWER ONE EIGHTH BLOCK}" + w for w in ("the", "cat", "sat", "on", "a", "mat")]
    vocab = [("<unk>", 0.0), *((w, -1.0) for w in words), *((c, -5.0) for c in "abcdehmnost")]
    raw = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return Tokenizer(raw)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


async def test_pieces_of_real_text_are_whole_characters_and_add_up() -> None:
    tokenizer = byte_tokenizer()
    ids = list(await tokenizer.encode(SAMPLE * 20))
    pieces = stream(tokenizer, ids, [])
    assert "".join(pieces) == SAMPLE * 20
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_characters_come_with_their_last_byte() -> None:
    assert stream(byte_tokenizer(), list("a👧b".encode()), []) == [
        "a", "", "", "", "👧", "b", "",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_add_up_to_the_whole(seed: int) -> None:
    draw = random.Random(seed)
    tokenizer = byte_tokenizer([("c", "a"), ("ca", "t"), ("ð", "Ł")])
    source = SAMPLE.encode()
    ids: list[int] = []
    while len(ids) < 400:
        match draw.randrange(4):
            case 0:
                ids.append(draw.randrange(tokenizer.vocab_size))
            case 1:
                ids += [draw.choice([0x80, 0xF0, 0xE2, 0xC3, 0xFF])] * draw.randrange(1, 12)
            case 2:
                start = draw.randrange(len(source))
                ids += source[start : start + draw.randrange(1, 20)]
            case _:
                ids.append(EOS)
    assert "".join(stream(tokenizer, ids, [])) == tokenizer.decode(ids)


def test_endless_garbage_keeps_the_window_bounded() -> None:
    tokenizer = byte_tokenizer()
    for ids in ([0x80] * 2000, [EOS] * 2000, [0xF0, 0x9F] * 1000):
        detokenizer = Detokenizer(tokenizer, [])
        text = "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()
        assert text == tokenizer.decode(ids)
        assert len(detokenizer._window) <= 4 * _WINDOW_MAX_TOKENS


def test_a_character_waits_for_its_end_behind_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    party = list("🎉".encode())
    for num_special in range(1, 60):
        ids = [97] * 30 + party[:2] + [EOS] * num_special + party[2:]
        assert "".join(stream(tokenizer, ids, [])) == tokenizer.decode(ids) == "a" * 30 + "🎉"


@pytest.mark.parametrize("num_prompt", [0, 1, 3, 30])
def test_a_leading_space_is_kept_after_a_prompt(num_prompt: int) -> None:
    tokenizer = metaspace_tokenizer()
    draw = random.Random(num_prompt)
    prompt = [draw.randrange(1, 7) for _ in range(num_prompt)]
    ids = [draw.randrange(1, tokenizer.vocab_size) for _ in range(300)]
    whole = tokenizer.decode(prompt + ids)
    assert "".join(stream(tokenizer, ids, prompt)) == whole[len(tokenizer.decode(prompt)) :]
    if num_prompt:
        assert stream(tokenizer, [1, 2], prompt)[0] == " the"


async def test_a_character_split_between_prompt_and_output_is_written_once() -> None:
    tokenizer = byte_tokenizer()
    party = list("🎉".encode())
    assert "".join(stream(tokenizer, party[2:], [97, *party[:2]])) == "🎉"


def test_a_step_costs_microseconds_however_long_the_text() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, [])
    began_s = time.thread_time()
    for turn in range(10_000):
        detokenizer.push(97 + turn % 26)
    assert (time.thread_time() - began_s) / 10_000 < 200e-6


async def test_a_long_prompt_does_not_hold_up_the_loop() -> None:
    tokenizer = byte_tokenizer()
    text = "words and words " * 80_000
    encoding = asyncio.create_task(tokenizer.encode(text))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.002)
        turns += 1
    assert len(encoding.result()) == len(text)
    # The whole takes most of a second, hundreds of turns; two or three if the interpreter lock were
    # held. Turns and not seconds: a busy machine stretches both alike.
    assert turns > 20
    tokenizer.close()


def test_special_tokens_follow_the_post_processor() -> None:
    raw = byte_tokenizer()._tokenizer
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS)]
    )
    assert asyncio.run(Tokenizer(raw).encode("a")) == (EOS, 97)


def test_a_tokenizer_is_read_from_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    byte_tokenizer()._tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).vocab_size == 257


def naive_cut(text: str, strings: list[str]) -> tuple[str, str | None]:
    """The definition: the earliest end wins, then the earliest begin."""
    for end in range(1, len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("seed", range(200))
def test_stop_strings_do_not_depend_on_the_cuts(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("ab") for _ in range(40))
    strings = ["".join(draw.choice("abc") for _ in range(draw.randrange(2, 7))) for _ in range(3)]
    matcher = StopMatcher(strings)
    shown, matched, position = "", None, 0
    while position < len(text) and matched is None:
        size = draw.randrange(1, 6)
        match = matcher.push(text[position : position + size], True)
        shown, matched, position = shown + match.text, match.matched, position + size
        # What is held back must be the beginning of a stop string.
        held = text[len(shown) : position]
        assert matched or not held or any(s.startswith(held) and s != held for s in strings)
    if matched is None:
        shown += matcher.flush()
    assert (shown, matched) == naive_cut(text, strings)


def test_nothing_is_held_back_without_need() -> None:
    matcher = StopMatcher(["<end>", "zz"])
    assert matcher.push("abc", True).text == "abc"
    assert matcher.push("d<en", True).text == "d"
    assert matcher.push("x", True).text == "<enx"


def push_all(output: OutputText, ids: bytes) -> tuple[str, str | None, int]:
    text = ""
    for count, token_id in enumerate(ids, 1):
        match = output.push(token_id)
        text += match.text
        if match.matched is not None:
            return text, match.matched, count
    last = output.finish()
    return text + last.text, last.matched, len(ids)


def test_a_stop_string_across_tokens_of_split_characters() -> None:
    output = OutputText(byte_tokenizer(), [], TextRules(("漢字",)))
    assert push_all(output, "ab漢字cd".encode()) == ("ab", "漢字", 8)


def test_no_stop_string_before_min_tokens() -> None:
    for min_tokens, expected in (
        (0, ("a", "END", 4)),
        (4, ("a", "END", 4)),
        (5, ("aENDb", "END", 8)),
        (99, ("aENDbENDc", None, 9)),
    ):
        output = OutputText(byte_tokenizer(), [], TextRules(("END",), min_tokens=min_tokens))
        assert push_all(output, b"aENDbENDc") == expected


def test_an_old_short_match_is_not_found_again_inside_a_longer_one() -> None:
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.push("xabc", False).text == "x"
    assert matcher.push("e", True).text == "abce"
    assert matcher.push("abc", True).matched == "bc"
