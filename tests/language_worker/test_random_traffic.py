"""Random traffic through the whole engine on the toy model: every token is the naive decoder's, no page lost.

Arrivals, rows that trickle in or start over, cancels, forks, preemption in tiny pools, chunks, prefix hits and
evictions, drafts, in any order. Then the same machine against planted bugs: each must be caught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from language_worker import (
    active,
    engine,
    page_keeper,
    prefix_cache,
    runner,
    sampling_state,
    scheduler,
    verification,
)
from language_worker.api import GenerateRequest
from language_worker.decode.autoregressive import Autoregressive
from language_worker.decode.drafts import OpenDrafts
from language_worker.decode.prompt_lookup import DraftIndex
from language_worker.decode.speculative import Speculative
from language_worker.errors import Cancelled, EngineError
from language_worker.page_pool import PagePool
from language_worker.plan import StepPlan
from language_worker.request import Event, Sequence
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import Results
from tests.language_worker.toy import MEDIA_ID, naive, toy_engine
from tests.profiles import IS_SOAK
from tests.tiny_models import make_qwen2_5_vl

COMMON = [(7 * i + i * i) % 20 for i in range(20)]
STEMS = [[4, 9, 16, 5, *COMMON], [4, 9, 2, 8, *COMMON]]  # equal but for two tokens
ROWS = {"p": [101, 102, 103], "q": [101, 102, 107], "r": [300]}
FOLDER: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    FOLDER[:] = [make_qwen2_5_vl(tmp_path_factory.mktemp("toy"))]


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0, 1.0]),
    seed=st.integers(0, 3),
    priority=st.sampled_from([0, 0, -3, 5]),
    n=st.sampled_from([1, 1, 3, 5]),
    max_tokens=st.integers(1, 14),
    ignore_eos=st.just(True),
    stop_token_ids=st.sampled_from([(), (), (2, 19)]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
)
CONFIG = {
    "capacity": st.integers(20, 90),
    "page_size": st.sampled_from([1, 2, 4]),
    "max_num_seqs": st.sampled_from([1, 2, 2, 3, 3, 6]),
    "max_step_tokens": st.sampled_from([6, 9, 32]),
    "max_prefill_chunk": st.sampled_from([0, 1, 3, 7]),
    "num_drafts": st.sampled_from([0, 0, 1, 3, 8]),
    "has_drafter": st.booleans(),
    "has_keys": st.booleans(),
    "prefix_cache": st.sampled_from([True, True, True, False]),
    "window": st.just(0),
    "swap_tokens": st.just(0),
}


REACHED = (
    "num_preemptions_total", "prefix_cache_hits_total", "kv_pages_cached", "request_failure_total",
    "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
)  # fmt: skip


class Traffic(RuleBasedStateMachine):
    """See the module."""

    reached: ClassVar[Counter[str]] = Counter()  # what the traffic brought about, over all runs
    has_state: ClassVar[bool] = False

    @initialize(**CONFIG)
    def start(self, **config: Any) -> None:
        self.begin(**config)

    def begin(
        self, capacity: int, num_drafts: int, has_drafter: bool, has_keys: bool, window: int, **config: Any
    ) -> None:
        if self.has_state:
            num_drafts, window = 0, 0
            config |= {"prefix_cache": False, "has_state": True, "swap_tokens": 0}
        config["preemption"] = "swap" if config["swap_tokens"] else "recompute"
        self.has_keys, self.window = has_keys, window
        source = OpenDrafts if has_drafter else DraftIndex
        config["strategy"] = Speculative(num_drafts, source) if num_drafts else Autoregressive()
        config["has_drafter"] = has_drafter and num_drafts > 0
        config |= {"num_pages": capacity // config["page_size"], "window": window}
        self.engine = toy_engine(FOLDER[0], rows=8, max_logits_bytes=4, **config)
        self.results = Results()
        self.requests: dict[str, tuple[GenerateRequest, list[str]]] = {}
        self.written: dict[str, int] = {}
        self.cancelled: set[str] = set()

    @rule(
        stem=st.sampled_from(STEMS),
        cut=st.sampled_from([1, 6, 9, 13, 13, 24]),
        tail=st.lists(st.integers(0, 20), max_size=2),
        sampling=SAMPLING,
        media=st.sampled_from(["", "", "p", "p", "q", "r", "pq", "pp"]).map(list),
    )
    def submit(self, stem: list[int], cut: int, tail: list[int], sampling: Any, media: list[str]) -> None:
        ids = (*stem[: cut // 2], *[MEDIA_ID] * len(media), *stem[cut // 2 : cut], *tail)
        self._submit(ids or (1,), sampling, media)

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 99), sampling=SAMPLING)
    def submit_again(self, pick: int, sampling: Any) -> None:
        """An earlier prompt, with other media of the same size if it has any."""
        asked, media = self.requests[f"r{pick % len(self.requests)}"]
        self._submit(asked.prompt_token_ids, sampling, [{"p": "q", "q": "p"}.get(m, m) for m in media])

    @rule(stem=st.sampled_from(STEMS), media=st.sampled_from(["p", "qr"]).map(list), sampling=SAMPLING)
    def submit_one_that_fails_on_admission(self, stem: list[int], media: list[str], sampling: Any) -> None:
        """It has waited for room among the media rows, then its logits are too large to return; the next one has the
        room."""
        for values in ({"return_logits": True}, {}):
            self._submit((*stem[:3], *[MEDIA_ID] * len(media)), sampling, media, **values)

    def _submit(self, ids: tuple[int, ...], sampling: Any, media: list[str], **values: Any) -> None:
        name = f"r{len(self.requests)}"
        asked = GenerateRequest(
            request_id=name, prompt_token_ids=ids, sampling=sampling, num_media=len(media), **values
        )
        self.requests[name] = asked, media
        self.engine.submit(asked)
        if media:
            self._announce(name)

    def _announce(self, name: str) -> None:
        media = self.requests[name][1]
        items = [
            {"grid": [1, 1, len(ROWS[m])], "rows": len(ROWS[m]), "content_key": m if self.has_keys else ""}
            for m in media
        ]
        self.engine.announce(name, sum(len(ROWS[m]) for m in media), items)
        self.written[name] = 0

    @rule()
    def step(self) -> None:
        self._step()

    @rule(count=st.integers(2, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self._step()

    def _step(self) -> bool:
        report = self.engine.step()
        self.results.take(report)
        if not report.did_run and not self.engine._wake.is_set():
            self._sleep()
        pages = [page for seq in self.engine.scheduler.running for page in seq.pages]
        self.reached["shared pages"] += len(pages) > len(set(pages))
        self._look()
        self.engine.scheduler.check_invariants()
        stats, running = self.engine.stats(), self.engine.scheduler.running
        assert stats["kv_pages_referenced"] == len({page for seq in running for page in seq.pages})
        assert stats["kv_pages_referenced"] + stats["kv_pages_cached"] <= self.engine.scheduler.pool.num_pages
        return report.did_run

    def _sleep(self) -> None:
        """The worker would wait now: nothing may be left that could go on."""
        self.reached["sleeps"] += 1
        report = self.engine.step()
        self.results.take(report)
        assert not report.did_run and not report.outputs, "it would have slept though it could go on"

    def _look(self) -> None:
        """After a step: what else has been reached."""

    def _write(self, name: str, count: int) -> None:
        buffer = self.engine.media_buffer(name)
        if buffer is not None:
            rows = [value for m in self.requests[name][1] for value in ROWS[m]]
            part = rows[self.written[name] : self.written[name] + count]
            buffer.write(self.written[name], torch.tensor(part, dtype=torch.float32).view(-1, 1))
            self.written[name] += len(part)

    @precondition(lambda self: self.written)
    @rule(pick=st.integers(0, 99), count=st.integers(1, 9))
    def rows_arrive(self, pick: int, count: int) -> None:
        self._write(sorted(self.written)[pick % len(self.written)], count)

    @precondition(lambda self: self.written)
    @rule(pick=st.integers(0, 99))
    def rows_start_over(self, pick: int) -> None:
        """A stream that was not complete comes anew, from its announcement on."""
        name = sorted(self.written)[pick % len(self.written)]
        if self.written[name] < sum(len(ROWS[m]) for m in self.requests[name][1]):
            self.reached["restarts"] += 1
            self.engine.forget_media(name)
            self._announce(name)
            self._step()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 99))
    def cancel(self, pick: int) -> None:
        name = f"r{pick % len(self.requests)}"
        if name not in self.results or self.results[name].done is None:
            self.cancelled.add(name)
        self.engine.cancel(name)

    def teardown(self) -> None:
        """Everything ends within a bound of steps, with the naive decoder's tokens, and nothing is left."""
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            for name in self.written:
                self._write(name, 99)
            self._step()
            if not self.engine.stats()["num_requests_running"] + self.engine.stats()["num_requests_waiting"]:
                break
        else:
            raise AssertionError("it does not come to an end")
        max_len = self.engine.limits.max_model_len
        for name, (asked, media) in self.requests.items():
            rows = [ROWS[m] for m in media]
            expected = naive(asked, rows, max_len=max_len, window=self.window, has_state=self.has_state)
            self._check(name, asked, expected)
        stats = self.engine.stats()
        for key in REACHED:
            self.reached[key] += int(stats[key])
        left = (
            "num_requests_running", "num_requests_waiting", "kv_pages_referenced", "kv_pages_swapped",
            "input_buffer_rows_reserved",
        )  # fmt: skip
        assert not any(stats[key] for key in left), stats

    def _check(self, name: str, asked: GenerateRequest, expected: list[list[int]]) -> None:
        result = self.results[name]
        ours = [result.tokens(i) for i in range(asked.sampling.n)]
        if result.error is None:
            assert ours == expected, name
        elif isinstance(result.error, Cancelled):
            assert name in self.cancelled
            assert all(part == whole[: len(part)] for part, whole in zip(ours, expected, strict=True)), name
        elif asked.return_logits:
            assert not any(ours) and "max_logits_bytes" in str(result.error), result.error
        else:  # a prompt that does not fit the pool
            assert not any(ours) and "exceeds the maximum length" in str(result.error), result.error


def _settings(max_examples: int, **values: Any) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        **values,
    )


def test_tokens_and_pages_are_right_whatever_the_traffic() -> None:
    Traffic.reached.clear()
    run_state_machine_as_test(Traffic, settings=_settings(3000 if IS_SOAK else 200))
    assert len(Traffic.reached) == 9 and min(Traffic.reached.values()) > 20, Traffic.reached


# -- planted bugs -----------------------------------------------------------------------------------------------------


def _skip_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner.ModelRunner, "copy_pages", lambda self, copies: None)


def _copy_late(patch: pytest.MonkeyPatch) -> None:
    """Page copies are made one step too late."""

    def copy_pages(self: Any, copies: Any) -> None:
        if earlier := self.__dict__.get("late"):
            self.cache.copy_pages(earlier)
        self.late = copies

    patch.setattr(runner.ModelRunner, "copy_pages", copy_pages)


def _copy_from_the_wrong_source(patch: pytest.MonkeyPatch) -> None:
    """A fork of a fork copies the page that its parent has not copied yet."""

    def start(self: Any, seq: Any, prefix: Any, num_tokens: int) -> None:
        original(self, seq, prefix, num_tokens)
        if prefix.partial is not None:
            self._copies[seq.pages[len(prefix.pages)]] = prefix.partial - 1 if prefix.partial else 1

    original = page_keeper.PageKeeper.start
    patch.setattr(page_keeper.PageKeeper, "start", start)


def _lend_one_too_many(patch: pytest.MonkeyPatch) -> None:
    """A sibling lends its own first token with the prompt."""

    def lent(self: Any, seq: Any, sibling: Any) -> Any:
        seq.prompt_len += 1
        try:
            return original(self, seq, sibling)
        finally:
            seq.prompt_len -= 1

    original = page_keeper.PageKeeper._lent
    patch.setattr(page_keeper.PageKeeper, "_lent", lent)


def _keep_length_when_preempted(patch: pytest.MonkeyPatch) -> None:
    def apply(self: Any, event: Event) -> None:
        before = self.kv_len
        original(self, event)
        if event is Event.PREEMPTED:
            self.kv_len = before // 2

    original = Sequence.apply
    patch.setattr(Sequence, "apply", apply)
    patch.setattr(scheduler.Scheduler, "check_invariants", lambda self: None)
    start = page_keeper.PageKeeper.start

    def keeping(self: Any, seq: Any, prefix: Any, num_tokens: int) -> None:
        before = seq.kv_len
        start(self, seq, prefix, num_tokens)
        seq.kv_len = max(seq.kv_len, before)

    patch.setattr(page_keeper.PageKeeper, "start", keeping)


def _free_shared_pages(patch: pytest.MonkeyPatch) -> None:
    """A page goes back to the free list with its first holder."""

    def drop(self: Any, page: int) -> int:
        self._refcount[page] = 1
        return original(self, page)

    original = PagePool._drop
    patch.setattr(PagePool, "_drop", drop)
    patch.setattr(PagePool, "check_invariants", lambda self: None)
    patch.setattr(scheduler.Scheduler, "check_invariants", lambda self: None)


def _leak_on_end(patch: pytest.MonkeyPatch) -> None:
    def release(self: Any, seq: Any) -> None:
        if len(seq.tokens) % 3:
            original(self, seq)

    original = page_keeper.PageKeeper.release
    patch.setattr(page_keeper.PageKeeper, "release", release)


def _forget_nothing(patch: pytest.MonkeyPatch) -> None:
    """Evicted pages keep their names."""
    patch.setattr(prefix_cache.PrefixCache, "_forget", lambda self, page: None)
    patch.setattr(prefix_cache.PrefixCache, "check_invariants", lambda self: None)
    patch.setattr(PagePool, "keep", lambda self, page: self._kept.add(page))


def _names_without(what: str) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        def digest(parent: bytes, tokens: bytes, start: int, media: list[Any]) -> bytes:
            if what == "parent":
                return original(b"", tokens, start, media)
            if what == "media":
                return original(parent, tokens, start, [])
            return original(parent, tokens[:-8], start, media)

        original = prefix_cache._digest
        patch.setattr(prefix_cache, "_digest", digest)

    return plant


def _unkeyed_media_are_equal(patch: pytest.MonkeyPatch) -> None:
    from language_worker import media

    patch.setattr(media.MediaItem, "cache_key", property(lambda self: (self.content_key or "none").encode()))


def _record_unfinished_pages(patch: pytest.MonkeyPatch) -> None:
    """A page counts as full one token too early."""

    def seal(self: Any, seq: Any, old_len: int) -> None:
        if self.cache is not None and seq.kv_len < len(seq.tokens):
            seq.kv_len += 1
            original(self, seq, old_len)
            seq.kv_len -= 1
        else:
            original(self, seq, old_len)

    original = page_keeper.PageKeeper.seal
    patch.setattr(page_keeper.PageKeeper, "seal", seal)


def _one_stream_of_numbers_for_all_samples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        sampling_state.SamplingState, "draw", lambda self: sampling_state.uniform_draw(self.seed, 0, self.num_generated)
    )
    patch.setattr("tests.language_worker.toy.SamplingState", _HonestState)


class _HonestState(sampling_state.SamplingState):
    """Untouched by the plant above: the naive decoder's."""

    def draw(self) -> float:
        return sampling_state.uniform_draw(self.seed, self.index, self.num_generated)


def _siblings_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    """A request is over with its first sample."""
    patch.setattr(
        active.ActiveRequest, "is_done", property(lambda self: bool(self.samples) and self.samples[0].is_done)
    )


def _media_rows_from_the_start(patch: pytest.MonkeyPatch) -> None:
    """A chunk takes its rows from the beginning of its item."""

    def media_rows(self: Any, start: int, end: int) -> tuple[int, int]:
        first, last = original(self, start, end)
        return 0, last - first

    original = Sequence.media_rows
    patch.setattr(Sequence, "media_rows", media_rows)


def _ready_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "ready_len", property(lambda self: len(self.tokens)))


def _accept_every_draft(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verification, "_is_right", lambda chosen, drafts: len(chosen) <= len(drafts))


def _draw_again_with_the_same_number(patch: pytest.MonkeyPatch) -> None:
    """Tokens behind a draft are drawn as if it were not there."""
    patch.setattr(sampling_state.SamplingState, "after", lambda self, token_ids: self)


def _rejected_drafts_are_final(patch: pytest.MonkeyPatch) -> None:
    def advance(self: Any, window: Any, tokens: Any) -> None:
        original(self, window, tokens)
        window.seq.kv_len = min(window.end, len(window.seq.tokens) - 1)
        if window.drafts and len(tokens) <= len(window.drafts):
            window.seq.tokens.insert(-1, window.drafts[len(tokens) - 1])

    original = Speculative.advance
    patch.setattr(Speculative, "advance", advance)


def _final_one_too_far(patch: pytest.MonkeyPatch) -> None:
    """The KV of the latest token counts as final before it was computed."""

    def advance(self: Any, window: Any, tokens: Any) -> None:
        original(self, window, tokens)
        if len(tokens) > 1 and len(tokens) < len(window.drafts):
            window.seq.kv_len += 1
            window.seq.tokens.append(tokens[-1])

    original = Speculative.advance
    patch.setattr(Speculative, "advance", advance)


def _drafts_beyond_the_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_keeper.PageKeeper, "num_spare", lambda self, seq: 99)


def _first_tokens_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    def choose(step: Any, served: Any, **values: Any) -> Any:
        return [choices[::-1] for choices in original(step, served, **values)]

    original = engine.choose
    patch.setattr(engine, "choose", choose)


def _awake_for_windows_alone(patch: pytest.MonkeyPatch) -> None:
    """After a step that ran nothing the engine sleeps, whatever the step made room for."""

    def plan(self: Any) -> StepPlan:
        plans[:] = [original(self)]
        return plans[0]

    plans: list[StepPlan] = []
    original, report = scheduler.Scheduler.plan, engine.StepReport
    patch.setattr(scheduler.Scheduler, "plan", plan)
    patch.setattr(
        engine, "StepReport", lambda outputs, did_run: report(outputs=outputs, did_run=bool(plans[0].windows))
    )


PLANTED = {
    plant.__name__.strip("_"): plant
    for plant in (
        _skip_copies,
        _copy_late,
        _copy_from_the_wrong_source,
        _lend_one_too_many,
        _keep_length_when_preempted,
        _free_shared_pages,
        _leak_on_end,
        _forget_nothing,
        _unkeyed_media_are_equal,
        _record_unfinished_pages,
        _one_stream_of_numbers_for_all_samples,
        _siblings_are_not_counted,
        _media_rows_from_the_start,
        _ready_too_early,
        _first_tokens_in_the_wrong_order,
        _accept_every_draft,
        _draw_again_with_the_same_number,
        _rejected_drafts_are_final,
        _final_one_too_far,
        _drafts_beyond_the_pages,
        _awake_for_windows_alone,
    )
} | {f"names_without_{what}": _names_without(what) for what in ("parent", "media", "last_token")}


@contextmanager
def _planted(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        PLANTED[name](patch)
        yield


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_bug_is_caught(name: str) -> None:
    with _planted(name), pytest.raises((AssertionError, EngineError, LookupError, ValueError)):
        run_state_machine_as_test(
            Traffic, settings=_settings(1500, phases=[Phase.generate], report_multiple_bugs=False)
        )
