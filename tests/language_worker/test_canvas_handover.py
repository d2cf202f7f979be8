"""A canvas between two engines: one computes its prompt, the other fills it in. The tokens are the published loop's,
and the forwards those of one engine but for the prompt's positions in the first of them.

What stands between the engines here keeps what was sent and hands it on in pieces; the real streams are tested with the
workers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker import canvas, runner
from language_worker.api import GenerateRequest
from language_worker.canvas import PromptKV
from language_worker.diffusion_params import DiffusionParams
from language_worker.engine import Engine
from language_worker.errors import Cancelled, KVMismatch, KVStreamFailed, PromptTooLong
from language_worker.handover import ledger
from language_worker.handover.exports import KVExport
from language_worker.handover.rows import KVHeader
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import Results, drive, make_engine, prompt, request
from tests.language_worker.test_block_diffusion import draw, expected
from tests.language_worker.test_handover import Link
from tests.oracles_llada import LladaOracle, by_count, generate
from tests.tiny_llada import make_llada
from tests.tiny_llada_v import IMAGE_ID, Made, make_llada_v
from tests.tiny_models import random_image

LEDGER = (
    "kv_pages_referenced", "kv_buffer_rows_reserved", "input_buffer_rows_reserved", "num_requests_running",
    "num_requests_waiting",
)  # fmt: skip
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"kv_policy": "none"},
    "prefix": {"kv_policy": "prefix"},
    "dual": {"kv_policy": "dual", "refresh_interval": 2, "vicinity": 1},
    "guided": {"kv_policy": "dual", "cfg_scale": 0.7},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llada(tmp_path_factory.mktemp("llada"), seed=3)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LladaOracle:
    return LladaOracle(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_llada_v(tmp_path_factory.mktemp("llada-v"), seed=6)


def prompt_only(asked: GenerateRequest) -> GenerateRequest:
    """What the prefill engine is told of a request."""
    sampling = SamplingParams(
        max_tokens=asked.sampling.max_tokens, temperature=0, ignore_eos=True, diffusion=asked.sampling.diffusion
    )
    return replace(asked, sampling=sampling)


class Pair:
    """Two engines and a link for each request. Rows are handed on `num_rows` at a time."""

    def __init__(self, folder: Path, *, num_rows: int = 7, decode: Mapping[str, Any] | None = None, **config: Any):
        settings = {"kv_cache_tokens": 8192, "page_size": 8, **config}
        self.prefill = make_engine(folder, **settings)
        self.decode = make_engine(folder, **{**settings, **(decode or {})})
        self.engines = (self.prefill, self.decode)
        self.results = (Results(), Results())
        self.links: dict[str, Link] = {}
        self._num_rows = num_rows
        self._media: dict[str, Sequence[torch.Tensor]] = {}

    def submit(self, asked: GenerateRequest, rows: Sequence[torch.Tensor] = ()) -> None:
        name = asked.request_id
        link = self.links[name] = Link(name, self.decode)
        export = KVExport(name, link, self.prefill.kv_plane, self.prefill.kv_of)  # type: ignore[arg-type]
        self.decode.submit(asked, imports_kv=True)
        self.prefill.submit(prompt_only(asked), export=export)
        if rows:
            self._media[name] = rows
            items = [{"grid": [1, 30 + i, 40], "rows": len(own)} for i, own in enumerate(rows)]
            self.prefill.announce(name, sum(map(len, rows)), items)

        def on_over(error: KVStreamFailed | None) -> None:
            self.prefill.export_over(export, error)

        export.when_over(on_over)

    def step(self) -> bool:
        """A step of both, and rows on their way; whether anything ran."""
        did_run = False
        for which, engine in enumerate(self.engines):
            report = engine.step()
            for name in self.results[which].take(report):
                if which == 0:
                    buffer = engine.media_buffer(name)
                    assert buffer is not None
                    buffer.write(0, torch.cat(list(self._media[name])))
            for output in report.outputs:  # as the worker does
                if getattr(output, "error", None) is not None:
                    link = self.links[output.request_id]
                    link.abort("Failed", str(output.error)) if which == 0 else link.drop()  # type: ignore[union-attr]
            engine.scheduler.check_invariants()
            did_run |= report.did_run or bool(report.outputs)
        for link in self.links.values():
            before = link.num_handed_on
            link.hand_on(self._num_rows)
            did_run |= link.num_handed_on > before
        return did_run

    def run(self) -> Results:
        idle = 0
        while idle < 3:
            idle = 0 if self.step() else idle + 1
        return self.results[1]

    def left(self) -> dict[str, float]:
        stats = [engine.stats() for engine in self.engines]
        return {name: one[name] for one in stats for name in LEDGER if one[name]}


def run_all(pair: Pair, requests: Iterable[GenerateRequest]) -> Results:
    for one in requests:
        pair.submit(one)
    return pair.run()


def drawn(num: int, seed: int) -> dict[str, tuple[tuple[int, ...], int, DiffusionParams]]:
    rng = random.Random(seed)
    return {f"r{i}": (prompt(rng.randint(1, 20), seed=i, vocab=250), *draw(rng)) for i in range(num)}


def test_tokens_and_forwards_are_the_published_loop_s(folder: Path, oracle: LladaOracle) -> None:
    """100 settings, all of them under way together."""
    cases, pair = drawn(100, seed=5), Pair(folder)
    results = run_all(
        pair,
        [
            request(name, ids, SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, diffusion=params))
            for name, (ids, length, params) in cases.items()
        ],
    )
    num_imported = 0
    for name, (ids, length, params) in cases.items():
        wanted, got, prompt_done = expected(oracle, ids, length, params), results[name], pair.results[0][name].done
        assert got.error is None and got.done is not None and prompt_done is not None, (name, got.error)
        assert got.tokens() == wanted.tokens, (name, params)
        handed = PromptKV.of(params, len(ids), length)
        assert got.done.num_forwards == len(wanted.forwards), (name, params)
        assert got.done.num_forwarded_tokens == sum(wanted.forwards) - handed.num_rows, (name, params)
        if params.kv_policy == "none":
            assert (prompt_done.num_forwards, handed.num_rows) == (0, 0)
        else:
            assert prompt_done.num_forwards == 1
            assert (
                prompt_done.num_forwarded_tokens
                == wanted.forwards[0]
                == params.num_copies * (len(ids) + handed.num_masks)
            )
        assert not pair.results[0][name].chunks, "the prefill engine says nothing"
        num_imported += handed.num_rows
    assert pair.decode.stats()["kv_tokens_imported_total"] == num_imported > 0
    assert not pair.left()


def test_samples_draws_and_logprobs_are_those_of_one_engine(folder: Path) -> None:
    """Co-batched, in a cache in which few canvases fit at once, and room for the KV of one prompt at a time."""
    rng, requests = random.Random(2), []
    for i in range(16):
        length, params = draw(rng)
        values: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.3]), "top_k": rng.choice([0, 5]), "seed": i}
        values |= {"n": rng.choice([1, 3]), "logprobs": 2, "stop_token_ids": rng.choice([(), (40, 41)])}
        own = SamplingParams(max_tokens=length, diffusion=params, ignore_eos=i % 2 == 0, **values)
        requests.append(request(f"r{i}", prompt(5 + i, seed=i, vocab=250), own))
    together = drive(make_engine(folder, kv_cache_tokens=8192, page_size=8), requests)
    small = Pair(folder, kv_cache_tokens=256, max_model_len=64, kv_buffer_tokens=48)
    apart = run_all(small, requests)
    for one in requests:
        ours, theirs = apart[one.request_id], together[one.request_id]
        assert ours.error is None and ours.done is not None and theirs.done is not None
        assert ours.done.num_forwards == theirs.done.num_forwards
        for i in range(one.sampling.n):
            assert (ours.tokens(i), ours.text(i)) == (theirs.tokens(i), theirs.text(i))
            assert ours.last(i).finish_reason == theirs.last(i).finish_reason
            assert [_told(c) for c in ours.chunks if c.index == i] == [_told(c) for c in theirs.chunks if c.index == i]
    assert not small.left()


def _told(chunk: Any) -> Any:
    return chunk.token_ids, [(entry.token_id, round(entry.logprob, 4)) for entry in chunk.logprobs or ()]


@pytest.mark.parametrize("policy", POLICIES)
def test_media_go_along(policy: str, made: Made) -> None:
    """A refresh computes the prompt anew, and for that needs the rows of its images."""
    length, block = 12, 4
    pictures, ids = [random_image(57, 90, seed=1), random_image(30, 30, seed=2)], (5, IMAGE_ID, 7, IMAGE_ID)
    own, found = made.oracle(ids, pictures)
    settings = {**POLICIES[policy], "block_length": block}
    wanted = generate(own, found, length, choose=lambda n: by_count(n, n), never=made.never_ids(), **settings).tokens
    sampling = SamplingParams(
        max_tokens=length, temperature=0, ignore_eos=True, diffusion=DiffusionParams(schedule="static", **settings)
    )
    pair = Pair(made.folder)
    for name in ("a", "b"):
        pair.submit(request(name, ids, sampling, num_media=2), made.image_rows(pictures))
    pair.submit(request("text", (9, 10), sampling))
    results = pair.run()
    assert [results[name].tokens() for name in ("a", "b")] == [wanted, wanted]
    assert len(results["text"].tokens()) == length and not pair.left()


def test_logits_of_the_prompt_come_from_who_computes_it(folder: Path, oracle: LladaOracle) -> None:
    ids = prompt(9, seed=1, vocab=250)
    for policy in ("none", "dual"):
        pair = Pair(folder)
        sampling = SamplingParams(max_tokens=8, temperature=0, diffusion=DiffusionParams(kv_policy=policy))  # type: ignore[arg-type]
        asked = request("a", ids, sampling)
        link = Link("a", pair.decode)
        pair.links["a"] = link
        export = KVExport("a", link, pair.prefill.kv_plane, pair.prefill.kv_of)  # type: ignore[arg-type]
        pair.decode.submit(asked, imports_kv=True)
        pair.prefill.submit(replace(prompt_only(asked), return_logits=True), export=export)
        export.when_over(lambda error: pair.prefill.export_over(export, error))  # noqa: B023
        assert pair.run()["a"].error is None
        logits = pair.results[0]["a"].logits
        assert logits is not None and (logits.double() - oracle(torch.tensor(ids))).abs().max() < 1e-4
        assert not pair.left()


@pytest.mark.parametrize("which", [0, 1])
def test_a_cancel_at_any_step_leaves_nothing_at_either_end(which: int, made: Made) -> None:
    rows = made.image_rows([random_image(57, 90, seed=1)])
    diffusion = [DiffusionParams(schedule="static", block_length=4, **values) for values in POLICIES.values()]
    for num_steps in range(0, 20, 2):
        pair = Pair(made.folder)
        for i, params in enumerate(diffusion):
            sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, diffusion=params)
            pair.submit(request(f"r{i}", (5, IMAGE_ID, 7), sampling, num_media=1), rows)
        for _ in range(num_steps):
            pair.step()
        for i in range(len(diffusion)):
            pair.engines[which].cancel(f"r{i}")
        results = pair.run()
        for i in range(len(diffusion)):
            assert results[f"r{i}"].done is not None or isinstance(results[f"r{i}"].error, (Cancelled, KVStreamFailed))
        assert not pair.left() and all(link.is_over for link in pair.links.values())


# -- what does not fit together ---------------------------------------------------------------------------------------


def _refused(engine: Engine, asked: GenerateRequest, header: KVHeader, total: int, items: Sequence[Any] = ()) -> Any:
    engine.submit(asked, imports_kv=True)
    engine.announce(asked.request_id, total, [header.to_body(), *items])
    results = Results()
    for _ in range(3):
        results.take(engine.step())
        buffer = engine.media_buffer(asked.request_id)
        if buffer is not None and not buffer.is_full:
            buffer.write(0, torch.zeros(buffer.rows.shape[1:]))
    return results[asked.request_id].error


@pytest.mark.parametrize(("num_tokens", "num_masks"), [(5, 7), (5, 0), (4, 8), (0, 0), (10, 8)])
def test_kv_of_another_canvas_is_refused(num_tokens: int, num_masks: int, folder: Path) -> None:
    engine = make_engine(folder)
    header = KVHeader(num_tokens=num_tokens, kv_of=engine.kv_of, num_masks=num_masks)
    error = _refused(engine, request("a", (1, 2, 3, 4, 5), SamplingParams(max_tokens=8)), header, num_tokens)
    assert isinstance(error, KVMismatch), error


def test_engines_of_different_lengths_say_so(folder: Path) -> None:
    """The answer takes what is left of the sequence, which is not the same on both sides."""
    pair = Pair(folder, max_model_len=64, decode={"max_model_len": 40})
    error = run_all(pair, [request("a", prompt(20, vocab=250), SamplingParams(max_tokens=40))])["a"].error
    assert isinstance(error, KVMismatch) and "44 masks" not in str(error) and "same max_model_len" in str(error)
    assert not pair.left()


def test_a_canvas_without_its_media_is_refused(made: Made) -> None:
    engine = make_engine(made.folder)
    sampling = SamplingParams(max_tokens=8, temperature=0, diffusion=DiffusionParams(kv_policy="none"))
    asked = request("a", (5, IMAGE_ID, 7), sampling, num_media=1)
    item = {"grid": [1, 30, 40], "rows": len(made.image_rows([random_image(57, 90, seed=1)])[0])}
    for state in ({}, {"media": torch.zeros(1, item["rows"], 31)}):  # type: ignore[list-item]
        header = KVHeader.of(0, state, engine.kv_of)
        error = _refused(engine, asked, header, header.num_state_rows(engine.kv_plane), [item])
        assert isinstance(error, KVMismatch) and "needs its media" in str(error)


def test_a_prompt_that_never_fits_between_them_is_refused(folder: Path) -> None:
    pair = Pair(folder, kv_buffer_tokens=16)
    asked = request("a", prompt(20, vocab=250), SamplingParams(max_tokens=8))
    error = run_all(pair, [asked])["a"].error
    assert isinstance(error, (PromptTooLong, KVStreamFailed)) and "kv_buffer_tokens" in str(error)
    assert not pair.left()


# -- planted bugs -----------------------------------------------------------------------------------------------------


def _skip_imports(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner.ModelRunner, "import_rows", lambda self, imports: None)


def _hand_over_the_first_version_only(patch: pytest.MonkeyPatch) -> None:
    def slots(self: Any, seq: Any, start: int, end: int) -> list[int]:
        return (original(self, seq, 0, seq.prompt_len) * seq.canvas.num_copies)[start:end]

    original = runner.ModelRunner._handed_slots
    patch.setattr(runner.ModelRunner, "_handed_slots", slots)


def _compute_the_prompt_without_masks(patch: pytest.MonkeyPatch) -> None:
    def query_range(self: Any) -> tuple[int, int]:
        return (0, self.prompt_len) if self.is_exported else original(self)

    original = canvas.Canvas.query_range
    patch.setattr(canvas.Canvas, "query_range", query_range)
    seen = canvas.Canvas.visible_end.fget
    patch.setattr(
        canvas.Canvas, "visible_end", property(lambda self: self.prompt_len if self.is_exported else seen(self))
    )


def _never_refresh_the_prompt(patch: pytest.MonkeyPatch) -> None:
    def query_range(self: Any) -> tuple[int, int]:
        start, end = original(self)
        return (start if self.is_exported or self.params.kv_policy == "none" else max(start, self.prompt_len)), end

    original = canvas.Canvas.query_range
    patch.setattr(canvas.Canvas, "query_range", query_range)


def _keep_the_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger.Handovers, "export_over", lambda self, export: None)


PLANTED = (
    _skip_imports,
    _hand_over_the_first_version_only,
    _compute_the_prompt_without_masks,
    _never_refresh_the_prompt,
    _keep_the_room,
)


@pytest.mark.parametrize("plant", PLANTED, ids=[p.__name__.strip("_") for p in PLANTED])
def test_planted_bugs_are_caught(
    plant: Callable[[pytest.MonkeyPatch], None], folder: Path, oracle: LladaOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_tokens_and_forwards_are_the_published_loop_s(folder, oracle)
