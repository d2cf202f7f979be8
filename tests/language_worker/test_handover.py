"""Random traffic through two engines of the toy model, one for prompts and one for answers: every token is the naive
decoder's, and neither keeps a page or a row.

What stands between them here keeps what was sent and hands it on when a test says so, in pieces; the real streams are
tested with the workers. Then the same machine against planted bugs: each must be caught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from language_worker import page_keeper, runner
from language_worker.api import GenerateRequest
from language_worker.engine import Engine
from language_worker.errors import Cancelled, KVMismatch, KVStreamFailed
from language_worker.handover import exports, ledger
from language_worker.handover.exports import KVExport
from language_worker.handover.rows import PLANE, KVHeader, kv_plane, pack_state, unpack_state
from language_worker.kv_cache import KVCache
from language_worker.models.base import KVSpec
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import Results
from tests.language_worker.toy import MEDIA_ID, naive, toy_engine
from tests.profiles import IS_SOAK
from tests.tiny_models import make_qwen2_5_vl
from transfer.errors import StreamAborted

ROWS = {"p": [101, 102, 103], "q": [101, 102, 107], "r": [300]}
STEM = [4, 9, 16, 5, 0, 8, 18, 10, 4, 0, 18, 18, 0, 4, 10, 18, 8, 0]
FOLDER: list[Path] = []
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    FOLDER[:] = [make_qwen2_5_vl(tmp_path_factory.mktemp("toy"))]


class Link:
    """Both ends of one stream: an OutgoingStream to its sender, rows in order to the decode engine."""

    def __init__(self, name: str, decode: Engine) -> None:
        self._name = name
        self._decode = decode
        self._chunks: list[torch.Tensor] = []
        self._callbacks: list[Callable[[Any], None]] = []
        self._error: Exception | None = None
        self._total = -1
        self.num_handed_on = 0
        self.is_over = False

    def announce(self, total_rows: int, items: Any) -> None:
        self._total = total_rows
        self._decode.announce(self._name, total_rows, items)
        if total_rows == 0:  # complete at once, as a real stream is
            self._end(None)

    def write(self, first_row: int, planes: dict[str, torch.Tensor]) -> None:
        assert planes[PLANE].is_contiguous() and first_row == sum(map(len, self._chunks))
        self._chunks.append(planes[PLANE])

    def on_done(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def result(self, timeout_s: float) -> None:
        if self._error is not None:
            raise self._error

    def abort(self, code: str, message: str) -> None:
        if not self.is_over:
            self._decode.fail(self._name, KVStreamFailed(message))
            self._end(StreamAborted(code, message))

    def hand_on(self, count: int) -> None:
        """The next rows, as far as they are wanted and there."""
        buffer = self._decode.media_buffer(self._name)
        if buffer is None or self.is_over:
            return
        if self._chunks:
            rows = torch.cat(self._chunks)[self.num_handed_on : self.num_handed_on + count]
            buffer.write(self.num_handed_on, rows)
            self.num_handed_on += len(rows)
        if self.num_handed_on == self._total:
            self._end(None)

    def drop(self) -> None:
        """Its receiver wants it no more."""
        if not self.is_over:
            self._end(StreamAborted("Cancelled", "not wanted"))

    def _end(self, error: Exception | None) -> None:
        self._error, self.is_over = error, True
        for callback in self._callbacks:
            callback(self)


class Split(RuleBasedStateMachine):
    """See the module."""

    reached: ClassVar[Counter[str]] = Counter()
    has_state: ClassVar[bool] = False

    @initialize(
        capacity=st.tuples(st.integers(16, 50), st.integers(16, 34)),
        page_size=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
        seats=st.sampled_from([1, 2, 3, 6]),
        chunk=st.sampled_from([0, 1, 3, 7]),
        cache=st.tuples(st.booleans(), st.booleans()),
        has_keys=st.booleans(),
        window=st.sampled_from([0, 0, 3, 8]),
    )
    def start(
        self, capacity: Any, page_size: Any, seats: int, chunk: int, cache: Any, has_keys: bool, window: int
    ) -> None:
        self.engines = [
            toy_engine(
                FOLDER[0],
                num_pages=capacity[i] // page_size[i],
                page_size=page_size[i],
                max_num_seqs=seats,
                max_prefill_chunk=chunk,
                prefix_cache=cache[i] and not self.has_state,
                window=0 if self.has_state else window,
                has_state=self.has_state,
            )
            for i in range(2)
        ]
        self.prefill, self.decode = self.engines
        self.has_keys, self.window = has_keys, window
        self.results = [Results(), Results()]
        self.requests: dict[str, tuple[GenerateRequest, list[str]]] = {}
        self.links: dict[str, Link] = {}
        self.broken: set[str] = set()

    @rule(
        cut=st.sampled_from([1, 2, 6, 9, 13, 18]),
        tail=st.lists(st.integers(0, 20), max_size=2),
        media=st.sampled_from(["", "", "p", "q", "r", "pq"]).map(list),
        ends_in_media=st.booleans(),
        sampling=st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 3),
            n=st.sampled_from([1, 1, 3]),
            max_tokens=st.integers(1, 14),
            ignore_eos=st.just(True),
            stop_token_ids=st.sampled_from([(), (2, 19)]),
            repetition_penalty=st.sampled_from([1.0, 1.5]),
        ),
    )
    def submit(self, cut: int, tail: list[int], media: list[str], ends_in_media: bool, sampling: Any) -> None:
        name, pads = f"r{len(self.requests)}", [MEDIA_ID] * len(media)
        ids = (*STEM[:cut], *tail, *pads) if ends_in_media else (*STEM[: cut // 2], *pads, *STEM[cut // 2 : cut], *tail)
        asked = GenerateRequest(request_id=name, prompt_token_ids=ids, sampling=sampling, num_media=len(media))
        self.requests[name] = asked, media
        link = self.links[name] = Link(name, self.decode)
        export = KVExport(name, link, kv_plane(torch.float32, 2))  # type: ignore[arg-type]
        self.decode.submit(asked, imports_kv=True)
        prompt = GenerateRequest(request_id=name, prompt_token_ids=ids, sampling=ONE, num_media=len(media))
        self.prefill.submit(prompt, export=export)

        def on_over(error: KVStreamFailed | None) -> None:
            self.prefill.export_over(export, error)

        export.when_over(on_over)
        if media:
            keys = media if self.has_keys else [""] * len(media)
            items = [
                {"grid": [1, 1, len(ROWS[m])], "rows": len(ROWS[m]), "content_key": k}
                for m, k in zip(media, keys, strict=True)
            ]
            self.prefill.announce(name, sum(len(ROWS[m]) for m in media), items)

    @rule(which=st.integers(0, 1), count=st.integers(1, 5))
    def steps(self, which: int, count: int) -> None:
        for _ in range(count):
            self._step(which)

    def _step(self, which: int) -> None:
        engine = self.engines[which]
        report = engine.step()
        if not report.did_run and not engine._wake.is_set():  # the worker would wait now
            later = engine.step()
            assert not later.did_run and not later.outputs, "it would have slept though it could go on"
        for name in self.results[which].take(report):
            if which == 0:
                buffer = engine.media_buffer(name)
                assert buffer is not None
                rows = [value for m in self.requests[name][1] for value in ROWS[m]]
                buffer.write(0, torch.tensor(rows, dtype=torch.float32).view(-1, 1))
        for output in report.outputs:  # as the worker does
            if getattr(output, "error", None) is not None:
                link = self.links[output.request_id]
                link.abort("Failed", str(output.error)) if which == 0 else link.drop()  # type: ignore[union-attr]
        engine.scheduler.check_invariants()

    @precondition(lambda self: self.links)
    @rule(pick=st.integers(0, 99), count=st.integers(1, 9))
    def rows_arrive(self, pick: int, count: int) -> None:
        list(self.links.values())[pick % len(self.links)].hand_on(count)

    @precondition(lambda self: self.links)
    @rule(pick=st.integers(0, 99), which=st.integers(0, 2))
    def break_off(self, pick: int, which: int) -> None:
        """A request is cancelled at either end, or its link breaks."""
        name = sorted(self.links)[pick % len(self.links)]
        done = self.results[1].get(name)
        if done is None or done.done is None:
            self.broken.add(name)
        if which < 2:
            self.engines[which].cancel(name)
        else:
            self.links[name].drop()
            self.decode.fail(name, KVStreamFailed("the link broke"))

    def teardown(self) -> None:
        if not hasattr(self, "engines"):
            return
        for _ in range(4000):
            for link in self.links.values():
                link.hand_on(99)
            for which in range(2):
                self._step(which)
            stats = [engine.stats() for engine in self.engines]
            if not any(s["num_requests_running"] + s["num_requests_waiting"] for s in stats):
                break
        else:
            raise AssertionError("it does not come to an end")
        for which in range(2):
            self._step(which)
        for name, (asked, media) in self.requests.items():
            max_len, rows = self.decode.limits.max_model_len, [ROWS[m] for m in media]
            window = 0 if self.has_state else self.window
            expected = naive(asked, rows, max_len=max_len, window=window, has_state=self.has_state)
            self._check(name, asked, expected)
        left = ("kv_pages_referenced", "input_buffer_rows_reserved", "kv_buffer_rows_reserved")
        for engine in self.engines:
            stats = engine.stats()
            assert not any(stats[key] for key in left), stats
            for key in ("num_preemptions_total", "prefix_cache_hits_total", "kv_tokens_imported_total"):
                self.reached[key] += int(stats[key])
        assert all(link.is_over for link in self.links.values())

    def _check(self, name: str, asked: GenerateRequest, expected: list[list[int]]) -> None:
        result = self.results[1][name]
        ours = [result.tokens(i) for i in range(asked.sampling.n)]
        if result.error is None:
            assert ours == expected, name
            self.reached["answered"] += 1
        elif "maximum length" in str(result.error):
            assert not any(ours), name
        else:
            assert name in self.broken and isinstance(result.error, (Cancelled, KVStreamFailed)), result.error
            assert all(part == whole[: len(part)] for part, whole in zip(ours, expected, strict=True)), name


def _settings(max_examples: int, **values: Any) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        **values,
    )


def test_tokens_and_pages_are_right_whatever_the_traffic() -> None:
    Split.reached.clear()
    run_state_machine_as_test(Split, settings=_settings(2000 if IS_SOAK else 100))
    assert len(Split.reached) == 4 and min(Split.reached.values()) > 2, Split.reached


# -- planted bugs -----------------------------------------------------------------------------------------------------


def _skip_imports(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner.ModelRunner, "import_rows", lambda self, imports: None)


def _import_into_shared_pages(patch: pytest.MonkeyPatch) -> None:
    """Rows are read as if the first of them were the first that no page has."""

    def import_rows(self: Any, imports: Any) -> None:
        for due in imports:
            slots = torch.tensor(self._slots(due.seq, due.start, due.end))
            self.cache.write_rows(slots, due.seq.imported.rows[: due.end - due.start])

    patch.setattr(runner.ModelRunner, "import_rows", import_rows)


def _forget_imports_of_preempted(patch: pytest.MonkeyPatch) -> None:
    """A preempted sequence gets pages again, and nothing in them."""

    def start(self: Any, seq: Any, prefix: Any, num_tokens: int) -> None:
        original(self, seq, prefix, num_tokens)
        if prefix.is_imported and seq.num_preemptions:
            self._imports.pop(seq.key)

    original = page_keeper.PageKeeper.start
    patch.setattr(page_keeper.PageKeeper, "start", start)


def _mix_up_a_chunk(patch: pytest.MonkeyPatch) -> None:
    """The rows of a chunk are sent in another order."""

    def advance(self: Any, kv_len: int, read: Any, read_state: Any) -> None:
        original(self, kv_len, lambda start, end: read(start, end).flip(0), read_state)

    original = exports.KVExport.advance
    patch.setattr(exports.KVExport, "advance", advance)


def _drop_the_last_input(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger, "_state_of", lambda active: {})


def _keep_the_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger.Handovers, "export_over", lambda self, export: None)


def _begin_without_all_pages(patch: pytest.MonkeyPatch) -> None:
    """A prompt whose KV is to leave starts from the last pages of its prefix, as others do."""

    def find_prefix(self: Any, seq: Any, siblings: Any) -> Any:
        seq.is_exported = False
        return original(self, seq, siblings)

    original = page_keeper.PageKeeper.find_prefix
    patch.setattr(page_keeper.PageKeeper, "find_prefix", find_prefix)


PLANTED = (
    _skip_imports,
    _import_into_shared_pages,
    _forget_imports_of_preempted,
    _mix_up_a_chunk,
    _drop_the_last_input,
    _keep_the_room,
    _begin_without_all_pages,
)


@pytest.mark.parametrize("plant", PLANTED, ids=[p.__name__.strip("_") for p in PLANTED])
def test_planted_bugs_are_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(Split, settings=_settings(400, phases=[Phase.generate], print_blob=False))


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_what_the_pages_held(dtype: torch.dtype) -> None:
    spec, cpu = KVSpec(num_layers=3, num_kv_heads=2, head_dim=4), torch.device("cpu")
    source, target = (KVCache(spec, num_pages=5, page_size=4, dtype=dtype, device=cpu) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for tensor in (t for layer in source.layers for t in layer):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    slots, others = torch.tensor([7, 3, 16, 0]), torch.tensor([1, 2, 3, 19])
    rows = source.read_rows(slots)
    assert rows.shape == (4, spec.row_elements) and rows.dtype == dtype
    target.write_rows(others, rows)
    for (keys, values), (new_keys, new_values) in zip(source.layers, target.layers, strict=True):
        for old, new in ((keys, new_keys), (values, new_values)):
            assert torch.equal(old.flatten(0, 1)[slots], new.flatten(0, 1)[others])
    assert all(int(t.flatten(0, 1).any(dim=(1, 2)).sum()) == 4 for layer in target.layers for t in layer)


def test_state_comes_back_as_it_was() -> None:
    plane = kv_plane(torch.bfloat16, 6)
    state = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2)}
    header = KVHeader.from_body(KVHeader.of(9, state, "c0ffee").to_body())
    assert header.kv_of == "c0ffee"
    rows = pack_state(state, plane)
    assert rows.shape == (header.num_state_rows(plane), 6) and rows.dtype == torch.bfloat16
    back = unpack_state(header, rows)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"kv_tokens": 1, "state": []},
        {"kv_tokens": 1, "state": [], "kv_of": 7},
        {"kv_tokens": -1, "state": [], "kv_of": ""},
        {"kv_tokens": 1.5, "state": [], "kv_of": ""},
        {"kv_tokens": 1, "state": {}, "kv_of": ""},
        {"kv_tokens": 1, "state": [{"name": "x"}], "kv_of": ""},
        {"kv_tokens": 1, "state": [], "kv_of": "", "more": 1},
    ],
)
def test_headers_that_say_nothing_are_refused(body: Any) -> None:
    with pytest.raises(KVMismatch):
        KVHeader.from_body(body)


@pytest.mark.parametrize("num_tokens", [3, 5])
def test_kv_of_another_prompt_is_refused(num_tokens: int) -> None:
    engine = toy_engine(FOLDER[0], num_pages=16)
    engine.submit(GenerateRequest(request_id="a", prompt_token_ids=(1, 2, 3, 4, 5), sampling=ONE), imports_kv=True)
    engine.announce("a", num_tokens, [KVHeader(num_tokens=num_tokens).to_body()])
    results = Results()
    results.take(engine.step())
    assert isinstance(results["a"].error, KVMismatch)


def test_kv_that_turns_out_wrong_leaves_its_room_to_the_next() -> None:
    """The second request's KV was waiting for the first's room; nothing else would wake the engine for it."""
    engine = toy_engine(FOLDER[0], num_pages=16, kv_buffer_tokens=8)
    for name, header, num_rows in (("a", KVHeader.of(4, {"x": torch.zeros(2)}), 5), ("b", KVHeader(num_tokens=4), 4)):
        asked = GenerateRequest(request_id=name, prompt_token_ids=(1, 2, 3, 4, 5), sampling=ONE)
        engine.submit(asked, imports_kv=True)
        engine.announce(name, num_rows, [header.to_body()])
    results = Results()
    assert results.take(engine.step()) == ["a"]
    buffer = engine.media_buffer("a")
    assert buffer is not None
    buffer.write(0, torch.zeros(5, 2))
    admitted: list[str] = []
    while (report := engine.step()).did_run:
        admitted += results.take(report)
    assert isinstance(results["a"].error, KVMismatch) and admitted == ["b"]


@pytest.mark.parametrize("is_lost", [False, True])
def test_an_export_that_ends_ends_no_other_under_its_name(is_lost: bool) -> None:
    """A request's id may be used again while its KV has not all left."""
    prefill, decode = (toy_engine(FOLDER[0], num_pages=16) for _ in range(2))
    asked = GenerateRequest(request_id="a", prompt_token_ids=(1, 2, 3, 4, 5), sampling=ONE)
    links = [Link("a", decode) for _ in range(2)]
    reserved, outcomes = [], []
    for link in links:
        export = KVExport("a", link, kv_plane(torch.float32, 2))  # type: ignore[arg-type]
        prefill.submit(asked, export=export)
        export.when_over(lambda error, export=export: prefill.export_over(export, error))
        if is_lost and link is links[1]:
            links[0].drop()
        results = Results()
        while "a" not in results or (results["a"].done is None and results["a"].error is None):
            results.take(prefill.step())
        outcomes.append(results["a"].error)
        reserved.append(prefill.stats()["kv_buffer_rows_reserved"])
    assert outcomes == [None, None] and reserved == [4, 4 if is_lost else 8]
    for link, num_left in zip(links, (4, 0), strict=True):
        link.drop()
        prefill.step()
        assert prefill.stats()["kv_buffer_rows_reserved"] == num_left


def test_a_fork_has_its_page_before_another_request_s_kv_comes_into_where_it_is_copied_from() -> None:
    """Sample 0 ends with the token it begins with and gives its page back; sample 1 was to get a copy of it."""
    ends = SamplingParams(n=2, seed=18, temperature=1.5, max_tokens=10, ignore_eos=True, stop_token_ids=(2, 19, 3, 5))
    plain = SamplingParams(seed=1, temperature=0.0, max_tokens=6, ignore_eos=True)
    first = GenerateRequest(
        request_id="a", prompt_token_ids=(4, 9, 16, 5, 0, 8, 18, 10, 4, 0), sampling=ends, num_media=0
    )
    second = GenerateRequest(
        request_id="b", prompt_token_ids=(7, 3, 3, 11, 12, 13, 2, 1, 6, 20), sampling=plain, num_media=0
    )
    prefill, decode = (toy_engine(FOLDER[0], num_pages=16, prefix_cache=False) for _ in range(2))
    links = {}
    for asked in (first, second):
        link = links[asked.request_id] = Link(asked.request_id, decode)
        decode.submit(asked, imports_kv=True)
        own = GenerateRequest(
            request_id=asked.request_id, prompt_token_ids=asked.prompt_token_ids, sampling=ONE, num_media=0
        )
        prefill.submit(own, export=KVExport(asked.request_id, link, kv_plane(torch.float32, 2)))
    for _ in range(5):
        prefill.step()
    results = Results()
    results.take(decode.step())
    links["a"].hand_on(99)
    results.take(decode.step())
    links["b"].hand_on(99)  # complete: the next plan imports it
    for _ in range(40):
        results.take(decode.step())
    expected = naive(first)
    assert len(expected[0]) == 1 < len(expected[1]), "sample 0 ends at once"
    assert [results["a"].tokens(i) for i in range(2)] == expected
    assert [results["b"].tokens(0)] == naive(second)
