"""The benchmark against peers runs, takes turns, and says who is missing. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
import stat
import sys
from pathlib import Path

import pytest

from bench.kernels.measure import Mismatch, Times
from bench.peers import report, suite
from bench.peers.cases import TINY, Case
from bench.peers.ceilings import Machine, Weights, ceiling, read_weights
from bench.peers.checkpoints import TINY_MODELS, find_or_make
from bench.peers.contenders import (
    LLAMA,
    OURS,
    TRANSFORMERS,
    VLLM,
    ChildContender,
    Failed,
    LlamaContender,
    Sample,
    Setting,
)
from bench.peers.gguf_convert import dense
from bench.peers.suite import Group, Measured, Row, check_tokens, measure, open_group, row_of

DECODE = Case("decode", "decode", 2, 40, 5)
MACHINE = Machine(1e9, {"float32": 1e9, "bfloat16": 1e9})


class Scripted:
    """Takes as long as it says, per token; fails after so many samples."""

    version = "1"

    def __init__(
        self, name: str, per_token_s: float, log: list[str], lasts: int = 1000, token: int = 7
    ) -> None:
        self._name, self._per_token_s, self._log = name, per_token_s, log
        self._lasts, self._token = lasts, token
        self.closed = False

    def sample(self, case: Case, seed: int) -> Sample:
        self._log.append(f"{self._name} {case.prompt_tokens}+{case.new_tokens}")
        self._lasts -= 1
        if self._lasts < 0:
            raise Failed("it is tired")
        first_s = self._per_token_s * case.batch * case.prompt_tokens
        rest = case.batch * (case.new_tokens - 1)
        return Sample(first_s, self._per_token_s * rest, rest, ((self._token,),) * case.batch)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: find_or_make(name, folder) for name in TINY_MODELS}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", TINY_MODELS)
def test_ours_and_transformers_take_turns(checkpoints: dict[str, Path], model: str) -> None:
    setting = Setting(checkpoints[model], "float32", threads=1, max_context=512)
    openers = {
        OURS: lambda: ChildContender("ours_child", setting),
        TRANSFORMERS: lambda: ChildContender("transformers_child", setting),
    }
    group = open_group(openers, {VLLM: "not installed", LLAMA: "not installed"})
    try:
        check_tokens(group, "float32")
        weights = read_weights(setting.checkpoint)
        for case in TINY:
            measured = measure(group, case, rounds=2, limit_s=100.0)
            most = ceiling(case, weights, "float32", MACHINE)
            row = row_of(model, "float32", case, measured, most)
            assert row.best == TRANSFORMERS and set(row.rates) == {OURS, TRANSFORMERS}
            assert row.ratio is not None and row.ratio > 0 and row.ceiling > 0
    finally:
        group.close()


def test_contenders_take_turns_in_alternating_order() -> None:
    log: list[str] = []
    group = Group({name: Scripted(name, 0.01, log) for name in (OURS, VLLM)})
    measured = measure(group, DECODE, rounds=2)
    assert log[:4] == [f"{OURS} 32+4"] * 2 + [f"{VLLM} 32+4"] * 2
    assert [line.split()[0] for line in log[4:]] == [OURS, VLLM, VLLM, OURS]
    assert {name: len(s) for name, s in measured.times.seconds.items()} == {OURS: 2, VLLM: 2}


def test_who_is_far_behind_gets_one_round_and_who_takes_too_long_a_glimpse() -> None:
    log: list[str] = []
    paces = {OURS: 0.001, VLLM: 0.001, LLAMA: 0.01, TRANSFORMERS: 10.0}
    group = Group({name: Scripted(name, pace, log) for name, pace in paces.items()})
    measured = measure(group, DECODE, rounds=3)
    counts = {name: len(s) for name, s in measured.times.seconds.items()}
    assert counts == {OURS: 3, VLLM: 3, LLAMA: 1, TRANSFORMERS: 1}
    assert measured.glimpsed == {TRANSFORMERS}
    assert f"{TRANSFORMERS} 40+5" not in log
    row = row_of("m", "float32", DECODE, measured, 1e6)
    assert row.rates[TRANSFORMERS] == pytest.approx(0.1) and row.best == VLLM


def test_a_peer_that_fails_is_named_and_the_others_go_on() -> None:
    log: list[str] = []
    failing = Scripted(VLLM, 0.01, log, lasts=3)
    group = Group({OURS: Scripted(OURS, 0.01, log), VLLM: failing})
    row = row_of("m", "float32", DECODE, measure(group, DECODE, rounds=3), 1e6)
    assert failing.closed and group.absent == {VLLM: "decode: it is tired"}
    assert row.best is None and row.ratio is None and set(row.rates) == {OURS}
    result = report.row_result(row, group.absent)
    assert result["peers"] == {
        TRANSFORMERS: "failed",
        VLLM: "decode: it is tired",
        LLAMA: "failed",
    }


def test_our_own_failure_ends_it() -> None:
    group = Group({OURS: Scripted(OURS, 0.01, [], lasts=3), VLLM: Scripted(VLLM, 0.01, [])})
    with pytest.raises(Failed):
        measure(group, DECODE, rounds=3)


def test_a_peer_that_does_not_load_is_named() -> None:
    def broken() -> Scripted:
        raise Failed("no such file")

    group = open_group({OURS: lambda: Scripted(OURS, 1.0, []), LLAMA: broken}, {VLLM: "absent"})
    assert set(group.present) == {OURS}
    assert group.absent == {VLLM: "absent", LLAMA: "no such file"}


def test_other_tokens_than_transformers_are_never_timed() -> None:
    theirs, ours = Scripted(TRANSFORMERS, 0.01, []), Scripted(OURS, 0.01, [], token=8)
    with pytest.raises(Mismatch):
        check_tokens(Group({OURS: ours, TRANSFORMERS: theirs}), "float32")
    wrong = Scripted(VLLM, 0.01, [], token=9)
    group = Group({OURS: Scripted(OURS, 0.01, []), TRANSFORMERS: theirs, VLLM: wrong})
    check_tokens(group, "float32")
    assert set(group.present) == {OURS, TRANSFORMERS} and VLLM in group.absent and wrong.closed


def test_a_child_that_dies_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="ours_child ended with code"):
        ChildContender("ours_child", Setting(tmp_path / "nothing", "float32", 1))


def llama(folder: Path, words: str, code: int = 0) -> Path:
    """A llama-batched-bench that says this."""
    (folder / "m-f32.gguf").touch()
    tool = folder / "llama-batched-bench"
    body = f"import sys\nprint({words!r} if '-m' in sys.argv else 'version: 5')\n"
    tool.write_text(f"#!{sys.executable}\n{body}sys.exit({code} if '-m' in sys.argv else 0)\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return folder


def test_llamas_own_times_are_taken(tmp_path: Path) -> None:
    row = {"pp": 40, "tg": 4, "pl": 2, "t_pp": 0.5, "t_tg": 0.25}
    llama(tmp_path, "loading\n" + json.dumps(row))
    contender = LlamaContender(tmp_path, Setting(tmp_path / "m", "float32", 1))
    assert contender.version == "5"
    sampled = contender.sample(DECODE, seed=0)
    assert sampled == Sample(first_s=0.5, rest_s=0.25, rest_tokens=8)
    assert sampled.seconds_per_token(DECODE) == 0.25 / 8


def test_a_llama_that_fails_or_is_not_there_is_a_failure(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "m", "float32", 1)
    with pytest.raises(Failed, match="has no llama-batched-bench"):
        LlamaContender(tmp_path, setting)
    contender = LlamaContender(llama(tmp_path, "bad magic", code=1), setting)
    with pytest.raises(Failed, match="code 1: bad magic"):
        contender.sample(DECODE, seed=0)


def test_ceilings_count_what_a_pass_reads_or_multiplies() -> None:
    weights = Weights(body=900, head=100, itemsize=4)
    prefill = Case("prefill", "prefill", 1, 10, 1)
    assert ceiling(DECODE, weights, "float32", MACHINE) == 2 * 1e9 / 4000
    assert ceiling(DECODE, weights, "bfloat16", MACHINE) == 2 * 1e9 / 2000
    # Stored in bf16, it need not be read as more.
    stored_narrow = dataclasses.replace(weights, itemsize=2)
    assert ceiling(DECODE, stored_narrow, "float32", MACHINE) == 2 * 1e9 / 2000
    assert ceiling(prefill, weights, "float32", MACHINE) == 1e9 / (2 * 910)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_weights_are_those_of_the_matrices(checkpoints: dict[str, Path], model: str) -> None:
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[model])
    matrices = {n: p.numel() for n, p in loaded.named_parameters() if p.ndim == 2}
    tables = {n: size for n, size in matrices.items() if "embed" in n or "lm_head" in n}
    weights = read_weights(checkpoints[model])
    assert weights.head == 300 * 64
    assert weights.body == sum(matrices.values()) - sum(tables.values())


def test_an_unknown_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gpt-huge"):
        find_or_make("gpt-huge", tmp_path)


def test_the_converter_sees_a_hybrid_without_experts() -> None:
    kinds = ["linear_attention", "mlp", "full_attention", "mlp"]
    seen = dense({"layers_block_type": kinds, "num_experts_per_tok": 2, "x": 1})
    assert seen == {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, "x": 1}
    mixture = {"layers_block_type": [*kinds, "moe"], "num_experts_per_tok": 2}
    assert dense(mixture) == mixture


def test_the_result_line_has_every_key() -> None:
    rows = [
        Row("m", "float32", "a", {OURS: 2.0, VLLM: 1.0}, VLLM, 2.0, 10.0),
        Row("m", "float32", "b", {OURS: 2.0, VLLM: 4.0}, VLLM, 0.5, 10.0),
        Row("m", "float32", "c", {OURS: 2.0}, None, None, 10.0),
    ]
    assert report.ratios_of(rows) == {"min_ratio": 0.5, "geomean_ratio": pytest.approx(1.0)}
    line = report.result_line({"rows": [report.row_result(row, {}) for row in rows]})
    first, _, last = json.loads(line.removeprefix("RESULT "))["rows"]
    assert {"model", "dtype", "case", "ours", "best_peer", "ratio"} <= set(first)
    assert (first["best_peer"], first["ratio"]) == (1.0, 2.0)
    assert last["best_peer"] is None and last["ratio"] is None


def test_the_ratio_is_of_the_rounds() -> None:
    times = Times({OURS: [1.0, 2.0, 4.0], VLLM: [2.0, 20.0, 8.0]})
    row = row_of("m", "float32", DECODE, Measured(times, frozenset()), 1.0)
    assert row.ratio == 2.0 and suite.geometric_mean([]) is None
