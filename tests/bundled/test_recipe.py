"""The training code: the block form is the recurrence, and an export means the same model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stateferry.bundled.recipe import checkpoint, cleaning, corpus, export, html_text, ngram
from stateferry.bundled.recipe.config import BUNDLED, ModelConfig, layers_of
from stateferry.bundled.recipe.model import LanguageModel
from stateferry.bundled.recipe.readers import Document
from stateferry.bundled.recipe.ssd import ssd_blocks, ssd_recurrent

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    layer_types=("mamba2",) * 3,
    head_dim=16,
    state_size=8,
    n_groups=2,
    chunk_size=16,
)
TINY_HYBRID = dataclasses.replace(
    TINY, layer_types=layers_of("M*-M-"), time_step_min=0.5, mlp_size=48, tied=False
)


def tiny_model(config: ModelConfig = TINY) -> LanguageModel:
    torch.manual_seed(3)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at a value that hides a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_block_form_equals_the_recurrence(length: int, ngroups: int) -> None:
    torch.manual_seed(length)
    double = torch.float64
    x = torch.randn(2, length, 4, 8, dtype=double)
    log_decay = -3 * torch.rand(2, length, 4, dtype=double)
    b = torch.randn(2, length, ngroups, 6, dtype=double)
    c = torch.randn(2, length, ngroups, 6, dtype=double)
    blocks = ssd_blocks(x, log_decay, b, c, chunk_size=16)
    torch.testing.assert_close(blocks, ssd_recurrent(x, log_decay, b, c), rtol=1e-10, atol=1e-11)


def test_gradients_of_the_block_form_are_those_of_the_recurrence() -> None:
    torch.manual_seed(0)
    inputs = (
        torch.randn(1, 40, 2, 4, dtype=torch.float64, requires_grad=True),
        (-torch.rand(1, 40, 2, dtype=torch.float64)).requires_grad_(),
        torch.randn(1, 40, 1, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 40, 1, 3, dtype=torch.float64, requires_grad=True),
    )
    ours = torch.autograd.grad(ssd_blocks(*inputs, chunk_size=16).square().sum(), inputs)
    theirs = torch.autograd.grad(ssd_recurrent(*inputs).square().sum(), inputs)
    for mine, definition in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, definition, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [TINY, TINY_HYBRID], ids=["mamba2", "hybrid"])
def test_an_exported_model_has_the_same_logits_in_transformers(
    tmp_path: Path, config: ModelConfig
) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model(config)
    export.export_model(model, tmp_path, dtype=torch.float32)
    other: Any
    other, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(0, TINY.vocab_size, (2, 75))
    with torch.no_grad():
        ours, theirs = model(ids), other(ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


@pytest.mark.parametrize("config", [TINY, TINY_HYBRID, *BUNDLED.values()])
def test_an_exported_model_is_the_model_that_was_trained(
    tmp_path: Path, config: ModelConfig
) -> None:
    model = tiny_model(config)
    export.export_model(model, tmp_path, dtype=torch.float32)
    again = export.load_exported(tmp_path)
    assert dataclasses.replace(again.config, dropout=config.dropout) == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_the_smallest_step_size_counts() -> None:
    """It is above what the tiny hybrid's layers would take, or the test above shows nothing."""
    ids = torch.randint(0, TINY.vocab_size, (1, 40))
    model = tiny_model(TINY_HYBRID)
    free = LanguageModel(dataclasses.replace(TINY_HYBRID, time_step_min=0.0)).eval()
    free.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(model(ids), free(ids), rtol=1e-2)


def test_export_refuses_a_step_size_that_mamba2_would_not_read(tmp_path: Path) -> None:
    model = tiny_model(dataclasses.replace(TINY, time_step_min=0.5))
    with pytest.raises(ValueError, match="smallest step size"):
        export.export_model(model, tmp_path)


def test_export_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="norm_f"):
        export.export_model(model, tmp_path)


def test_checkpoint_gives_back_weights_and_moments(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, TINY.vocab_size, (2, 33))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    loaded, progress = checkpoint.load_model(tmp_path)
    assert progress == {"step": 1}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    restored = torch.optim.AdamW(loaded.parameters())
    checkpoint.restore_moments(tmp_path, loaded, restored, steps=1)
    for mine, other in zip(model.parameters(), loaded.parameters(), strict=True):
        saved = optimizer.state[mine]["exp_avg"].bfloat16().float()
        assert torch.equal(saved, restored.state[other]["exp_avg"])


def test_ngram_probabilities_sum_to_one() -> None:
    text = b"the cat sat on the mat and the rat sat on the cat "
    levels = ngram.fit(ngram.to_symbols([text, text[::-1]]), order=3)
    for first, second in itertools.product(b"tx", b"hq"):
        context = first * ngram.SYMBOLS + second
        keys = context * ngram.SYMBOLS + np.arange(ngram.SYMBOLS, dtype=np.int64)
        assert ngram.probabilities(levels, keys).sum() == pytest.approx(1.0)


def test_ngram_learns() -> None:
    text = b"abcabcabcabc" * 50
    levels = ngram.fit(ngram.to_symbols([text]), order=5)
    assert ngram.total_bits(levels, ngram.to_symbols([text])) / len(text) < 0.2
    assert ngram.total_bits(levels, ngram.to_symbols([b"zyxzyx"])) / 6 > 6


def test_html_keeps_sentences_and_drops_the_rest() -> None:
    page = """<html><head><title>T</title></head><body><div class="sphinxsidebar"><p>This is the
    menu of the page and it must not be in the text at all, whatever it says.</p></div>
    <h2>On cats</h2><p>A cat is an animal that lives with people, and it sleeps for the most part
    of the day.</p><pre>x = 1</pre><p>foo_bar(x, y) returns a::b</p></body></html>"""
    assert cleaning.prose_document(html_text.html_blocks(page)) == [
        "On cats",
        "A cat is an animal that lives with people, and it sleeps for the most part of the day.",
    ]


def test_training_text_loses_paragraphs_that_are_held_out() -> None:
    shared = "In the beginning God created the heaven and the earth, and the earth was without form"
    own = "It is a truth universally acknowledged that a single man must be in want of a wife"
    heldout = set(corpus.shingles(shared, stride=1))
    document = Document("id", "key", [shared, own])
    stats = corpus.SourceStats()
    assert corpus.drop_leaks(document, heldout, stats) == own
    assert stats.leaking_paragraphs == 1
