"""The engine on a GPU: its tokens are the CPU's, its rows those of any other cut, and captured
steps give the bytes of those that are not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("llguidance")

from stateferry.bundled import bundled_model_dir
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.sampling import SamplingParams
from stateferry.engine.decode_graphs import DecodeGraphs
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    PendingToken,
    SampleSpec,
)
from stateferry.engine.launch import Started
from stateferry.engine.sampler import likeliest_rows
from stateferry.worker.parts import EngineParts, build_engine
from stateferry_kernels.linear.triton_ops import ROW_BUCKET
from support.gpu_models import Sizes as ModelSizes
from support.gpu_models import write_random_model, write_small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: the engine on a GPU and its graphs are NOT tested here",
    ),
]

MODELS = ("bundled", "Mamba2", "NemotronH", "served", "experts")
PROMPTS = (1, 5, 63, 64, 65, 130)
DTYPES = ("float32", "bfloat16")
SpecOf = Callable[[int], SampleSpec]


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=["Mamba2", "NemotronH", "served"])
def random_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(request.param, tmp_path_factory)


def directory(name: str, folders: pytest.TempPathFactory) -> Path:
    if name == "bundled":
        return bundled_model_dir()
    if name == "served":
        # Head shapes that the scan's own kernels are for, and a group of heads that is not 2**n.
        sizes = ModelSizes(
            hidden=256, headdim=64, dstate=128, attention_heads=6, attention_head_dim=64
        )
        return write_random_model(folders.mktemp("model"), "M*-M", sizes)
    return write_small_model(folders.mktemp("model"), name)


class Sequences:
    """Greedy sequences over one engine, whose pools are full of NaN in between."""

    def __init__(
        self, model_dir: Path, device: str, dtype: str = "float32", graphs: str = "auto"
    ) -> None:
        kernels = "torch" if device == "cpu" else "auto"
        self.parts: EngineParts = build_engine(
            model_dir,
            ModelSection(dtype=dtype, max_context_tokens=512, grid_tokens=64),
            WorkerSection(
                device=device,
                kernels=kernels,
                max_requests=80,
                memory_bytes=1 << 30,
                decode_graphs=graphs,
            ),
            CacheSection(enabled=False),
        )
        self.parts.cache.pools.poison()
        self.tokens: dict[str, list[int]] = {}

    def begin(self, prompts: dict[str, Sequence[int]]) -> None:
        rows = []
        for name, prompt in prompts.items():
            assert self.parts.cache.reserve(name, 400)
            lease = self.parts.cache.lease(name)
            rows.append(ExtendRow(lease, tuple(prompt), spec(0)))
            self.tokens[name] = []
        self._take(list(prompts), self.parts.runner.extend(ExtendBatch(tuple(rows)))())

    def step(self, names: Sequence[str], forced: int | None = None) -> None:
        """Consume each one's last token, or this one."""
        rows = tuple(
            DecodeInput(
                self.parts.cache.lease(name),
                self.tokens[name][-1] if forced is None else forced,
                spec(len(self.tokens[name])),
            )
            for name in names
        )
        self._take(names, self.parts.runner.decode(DecodeBatch(rows))())

    def step_ahead(self, names: Sequence[str], count: int, most: int, spec_of: SpecOf) -> int:
        """So many steps, up to ``most`` of which have been started and not waited for. Returns how
        many were started while the one before ran, as far as anybody knew."""
        waiting: deque[Started] = deque()
        last: dict[str, int | PendingToken] = {name: self.tokens[name][-1] for name in names}
        index, overlapped = len(self.tokens[names[0]]), 0
        for number in range(count):
            rows = tuple(
                DecodeInput(self.parts.cache.lease(name), last[name], spec_of(index + number))
                for name in names
            )
            last = {name: row.sampled for name, row in zip(names, rows, strict=True)}
            overlapped += bool(waiting)
            waiting.append(self.parts.runner.decode(DecodeBatch(rows)).start())
            if len(waiting) == most:
                self._take(names, waiting.popleft().sampled())
        for started in waiting:
            self._take(names, started.sampled())
        return overlapped

    def end(self, name: str) -> None:
        self.parts.cache.release(name)

    def state_bytes(self, name: str) -> list[torch.Tensor]:
        """All that another worker would be sent, bit by bit."""
        views = self.parts.cache.pools.sequence_views(self.parts.cache.lease(name))
        pieces = [piece.contiguous().flatten() for view in views for piece in view.pieces]
        return [piece.view(torch.uint8).cpu() for piece in pieces]

    def _take(self, names: Sequence[str], tokens: Sequence[object]) -> None:
        for name, token in zip(names, tokens, strict=True):
            assert token is not None, "logits that are not finite"
            self.tokens[name].append(token.token_id)  # type: ignore[attr-defined]


def spec(index: int) -> SampleSpec:
    return SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), index)


def prompt(parts: EngineParts, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids = torch.randint(3, parts.limits.vocab_size, (length,), generator=generator)
    return [int(i) for i in ids]


def assert_same(one: Sequences, other: Sequences, name: str, other_name: str | None = None) -> None:
    pairs = zip(one.state_bytes(name), other.state_bytes(other_name or name), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), name


def test_tokens_are_those_of_the_cpu(model_dir: Path) -> None:
    """Prompts together, then steps past grid points."""
    runs = [Sequences(model_dir, device) for device in ("cpu", "cuda")]
    assert runs[1].parts.kernels == "triton"
    for run in runs:
        prompts = {str(length): prompt(run.parts, length) for length in PROMPTS}
        run.begin(prompts)
        for _ in range(70):
            run.step(list(prompts))
    assert runs[0].tokens == runs[1].tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_steps_give_the_bytes_of_others(random_dir: Path, dtype: str) -> None:
    """Sequences join and leave, so that graphs of many sizes are used, and pass grid points."""
    runs = [Sequences(random_dir, "cuda", dtype, graphs) for graphs in ("off", "auto")]
    assert runs[0].parts.runner.graphs is None
    graphs = runs[1].parts.runner.graphs
    assert graphs is not None and graphs.refused is None
    for run in runs:
        names = [str(i) for i in range(66)]
        run.begin({name: prompt(run.parts, 40 + i) for i, name in enumerate(names[:3])})
        for _ in range(30):
            run.step(names[:3])
        run.begin({name: prompt(run.parts, 3 + i, seed=1) for i, name in enumerate(names[3:])})
        for count in (66, 65, 64, 33, 7, 1):
            for name in names[count:]:
                run.end(name)
            names = names[:count]
            for _ in range(3):
                run.step(names)
    assert runs[0].tokens == runs[1].tokens
    assert_same(runs[0], runs[1], "0")


def drawn(index: int) -> SampleSpec:
    return SampleSpec(SamplingParams(0.9, 0, 1.0, 7, None), index)


@pytest.mark.parametrize("graphs", ["off", "auto"])
@pytest.mark.parametrize("spec_of", [spec, drawn])
def test_steps_that_nobody_waited_for(random_dir: Path, graphs: str, spec_of: SpecOf) -> None:
    """Tokens that only the device has seen are consumed; past grid points, in graphs of two sizes
    that follow each other, with one row that leaves."""
    runs = [Sequences(random_dir, "cuda", "float32", graphs) for _ in range(2)]
    for most, run in zip((1, 3), runs, strict=True):
        names = ["a", "b", "c"]
        run.begin({name: prompt(run.parts, 50 + i) for i, name in enumerate(names)})
        overlapped = [run.step_ahead(names[:n], 40, most, spec_of) for n in (3, 2, 1)]
        assert overlapped == ([0] * 3 if most == 1 else [39] * 3)
        assert len(set(run.tokens["a"])) > 1
    assert runs[0].tokens == runs[1].tokens
    assert_same(runs[0], runs[1], "a")
    if spec_of is spec and graphs == "auto":
        row = DecodeInput(runs[0].parts.cache.lease("a"), 7, spec(1))
        torch.cuda.synchronize()
        with no_waiting():
            started = runs[0].parts.runner.decode(DecodeBatch((row,))).start()
        [token] = started.sampled()
        assert token is not None and row.sampled.known() == token.token_id


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_a_captured_step(random_dir: Path, dtype: str) -> None:
    runs = [Sequences(random_dir, "cuda", dtype, graphs) for graphs in ("off", "auto")]
    logits = []
    for run in runs:
        names = ["a", "b", "c"]
        run.begin({name: prompt(run.parts, 20 + i) for i, name in enumerate(names)})
        rows = tuple(DecodeInput(run.parts.cache.lease(name), 7, spec(1)) for name in names)
        batch, runner = DecodeBatch(rows), run.parts.runner
        plan, kv_plan = batch.plan(run.parts.grid), batch.kv_plan(run.parts.grid)
        with torch.inference_mode():
            if runner.graphs is None:
                ids = runner._tokens([7, 7, 7])
                logits.append(runner._model.decode(ids, plan, kv_plan, runner.caches))
            else:
                decoded = runner.graphs.decode([7, 7, 7], [-1] * 3, plan, kv_plan)
                assert decoded is not None
                logits.append(decoded.logits.clone())
                assert torch.equal(decoded.likeliest.wait(), likeliest_rows(decoded.logits).cpu())
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_rows_are_prefill_rows(random_dir: Path, dtype: str) -> None:
    """Where no call has more than ROW_BUCKET rows, to the byte, through the whole model."""
    run = Sequences(random_dir, "cuda", dtype)
    whole = prompt(run.parts, ROW_BUCKET)
    for cut in (1, 20, 40):
        run.begin({"whole": whole})
        run.begin({"cut": whole[:cut]})
        for token in whole[cut:]:
            run.step(["cut"], forced=token)
        assert run.tokens["cut"][-1] == run.tokens["whole"][-1]
        assert_same(run, run, "whole", "cut")
        run.end("whole")
        run.end("cut")


def test_a_commit_leaves_the_logits_of_its_step(random_dir: Path) -> None:
    """In whatever order graphs were captured: sampling reads logits after the commit is queued."""
    run = Sequences(random_dir, "cuda", "bfloat16", "off")
    names = ["a", "b", "c"]
    run.begin({name: prompt(run.parts, 63) for name in names})
    grid, runner = run.parts.grid, run.parts.runner
    graphs = DecodeGraphs(runner._model, runner.caches, page_tokens=grid, longest=512)
    rows = tuple(DecodeInput(run.parts.cache.lease(name), 7, spec(1)) for name in names)
    one, three = DecodeBatch(rows[:1]), DecodeBatch(rows)
    with torch.inference_mode():
        for batch in (one, three):
            ids, given = [7] * len(batch.rows), [-1] * len(batch.rows)
            decoded = graphs.decode(ids, given, batch.plan(grid), batch.kv_plan(grid))
            due = batch.commit_plan(grid)
            assert decoded is not None and due is not None
            before = decoded.logits.clone()
            for plan in (due, one.commit_plan(grid)):
                assert plan is not None
                graphs.commit(plan)
                assert torch.equal(decoded.logits, before)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_a_step_does_not_wait_for_the_device(random_dir: Path, graphs: str) -> None:
    """Nothing but the reading of tokens does."""
    run = Sequences(random_dir, "cuda", "bfloat16", graphs)
    run.begin({"a": prompt(run.parts, 70)})
    run.step(["a"])
    batch = DecodeBatch((DecodeInput(run.parts.cache.lease("a"), 7, spec(2)),))
    plan, kv_plan = batch.plan(run.parts.grid), batch.kv_plan(run.parts.grid)
    assert run.parts.cache.reserve("b", 100)
    extend = ExtendBatch((ExtendRow(run.parts.cache.lease("b"), (5,) * 70, spec(0)),))
    model, runner = run.parts.runner._model, run.parts.runner
    with torch.inference_mode(), no_waiting():
        if runner.graphs is None:
            model.decode(runner._tokens([7]), plan, kv_plan, runner.caches)
        else:
            runner.graphs.decode([7], [-1], plan, kv_plan)
        plans = extend.plan(run.parts.grid), extend.kv_plan(run.parts.grid)
        model.extend(runner._tokens([5] * 70), *plans, runner.caches, [69])


def test_experts_are_not_captured(tmp_path: Path) -> None:
    """Their numbers of rows are read on the host; steps run uncaptured, and say so."""
    run = Sequences(write_small_model(tmp_path, "experts"), "cuda")
    graphs = run.parts.runner.graphs
    assert graphs is not None and graphs.refused is not None
    assert "waits for the device" in graphs.refused
