"""The pipeline with a real tiny model behind a gate: order, sharing, isolation, bounds, and nothing left behind."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from embedding_worker.api import EmbedItem, EncodeSummary
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedConfigError, EmbedError, EmbedQueueFull, EmbedStopped
from embedding_worker.pipeline import EmbedPipeline
from embedding_worker.preprocess import ImageLimits, PreparedImage, prepare_image
from embedding_worker.runner import VisionRunner
from tests.embedding_worker.images import BAD, png
from tests.tiny_models import make_qwen2_5_vl

WAIT_S = 120.0


class GatedRunner:
    """A VisionRunner whose `encode` waits for the gate, records its batches, and fails on images told to."""

    def __init__(self, runner: VisionRunner) -> None:
        self.inner = runner
        self.settings, self.content_key, self.num_rows = runner.settings, runner.content_key, runner.num_rows
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.batches: list[list[tuple[int, int, int]]] = []
        self.poison: tuple[int, int, int] | None = None
        self.gate.set()

    def warm_up(self) -> None:
        pass

    def encode(self, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
        grids = [image.grid for image in images]
        self.batches.append(grids)
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if self.poison in grids:
            raise RuntimeError("out of memory, say")
        return self.inner.encode(images)

    @property
    def num_encoded(self) -> int:
        return sum(map(len, self.batches))


@dataclasses.dataclass(eq=False)
class Job:
    """Records everything it is told, in order."""

    media: Sequence[bytes]
    deadline: float = float("inf")
    alive: bool = True
    break_on_rows: bool = False
    first_row: int = 0
    items: tuple[EmbedItem, ...] = ()
    rows: list[torch.Tensor] = dataclasses.field(default_factory=list)
    summary: EncodeSummary | None = None
    error: EmbedError | None = None
    announced: threading.Event = dataclasses.field(default_factory=threading.Event)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def is_alive(self) -> bool:
        return self.alive

    def on_items(self, items: tuple[EmbedItem, ...]) -> None:
        assert not self.rows
        self.items = items
        self.announced.set()

    def on_rows(self, first_row: int, rows: torch.Tensor) -> None:
        assert first_row == sum(part.shape[0] for part in self.rows)
        assert not self.over.is_set()
        if self.break_on_rows:
            raise OSError("the far end is gone")
        self.rows.append(rows)

    def on_encoded(self, summary: EncodeSummary) -> None:
        assert not self.over.is_set()
        self.summary = summary
        self.over.set()

    def on_failed(self, error: EmbedError) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()

    def wait(self) -> Job:
        assert self.over.wait(WAIT_S), "the job never ended"
        return self


@dataclasses.dataclass
class Bench:
    runner: GatedRunner
    pipeline: EmbedPipeline

    def submit(self, *media: bytes, **fields: Any) -> Job:
        job = Job(media=media, **fields)
        self.pipeline.submit(job)
        return job

    def expected(self, *media: bytes) -> list[torch.Tensor]:
        limits = ImageLimits(max_bytes=10**8, max_pixels=10**8)
        images = [prepare_image(medium, 0, self.runner.settings, limits) for medium in media]
        return [self.runner.inner.encode([image])[0] for image in images]

    def assert_right(self, job: Job) -> None:
        assert job.wait().error is None
        for rows, expected in zip(job.rows, self.expected(*job.media), strict=True):
            torch.testing.assert_close(rows, expected, rtol=0, atol=2e-5)
        assert [item.num_rows for item in job.items] == [rows.shape[0] for rows in job.rows]

    def close_gate(self) -> None:
        """Hold the encoder inside a batch of its own."""
        self.runner.gate.clear()
        self.blocker = self.submit(png(28, 28, seed=999))
        assert self.runner.entered.acquire(timeout=WAIT_S)
        self.runner.batches.clear()

    def open_gate(self) -> None:
        self.runner.gate.set()
        self.blocker.wait()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> VisionRunner:
    folder = make_qwen2_5_vl(tmp_path_factory.mktemp("model"), seed=8, max_pixels=28 * 28 * 30)
    return VisionRunner.load(folder, EmbedConfig(device="cpu"))


@pytest.fixture
def make_bench(runner: VisionRunner) -> Iterator[Any]:
    benches: list[Bench] = []

    def make(**config: Any) -> Bench:
        gated = GatedRunner(runner)
        bench = Bench(runner=gated, pipeline=EmbedPipeline(gated, EmbedConfig(**config)))  # type: ignore[arg-type]
        bench.pipeline.start()
        benches.append(bench)
        return bench

    yield make
    for bench in benches:
        bench.runner.gate.set()
        bench.pipeline.close()
        assert bench.pipeline.stats()["embed_requests_open"] == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("embed-")]


def test_rows_come_in_prompt_order_after_the_items(make_bench: Any) -> None:
    bench = make_bench(max_batch_patches=40)  # smaller than the larger images: several batches
    media = [png(120, 90), png(28, 28), png(200, 56), png(61, 45), png(90, 90)]
    job = bench.submit(*media)
    bench.assert_right(job)
    assert job.summary is not None
    assert job.summary.num_rows == sum(rows.shape[0] for rows in job.rows)
    assert job.summary.num_cache_hits == 0
    assert job.summary.encode_ms > 0 < job.summary.preprocess_ms
    assert len(bench.runner.batches) > 1


def test_items_are_known_before_anything_is_encoded(make_bench: Any) -> None:
    bench = make_bench()
    bench.close_gate()
    job = bench.submit(png(120, 90), png(61, 45))
    assert job.announced.wait(WAIT_S)
    assert bench.runner.num_encoded == 0
    assert not job.rows
    bench.open_gate()
    bench.assert_right(job)


def test_equal_media_are_encoded_once(make_bench: Any) -> None:
    bench = make_bench()
    bench.close_gate()
    first, second = png(120, 90), png(61, 45)
    jobs = [bench.submit(first, second, first), bench.submit(second, first), bench.submit(first)]
    assert all(job.announced.wait(WAIT_S) for job in jobs)
    bench.open_gate()
    for job in jobs:
        bench.assert_right(job)
    assert bench.runner.num_encoded == 2
    later = bench.submit(second, first)
    bench.assert_right(later)
    assert bench.runner.num_encoded == 2
    assert later.summary is not None
    assert (later.summary.num_cache_hits, later.summary.encode_ms) == (2, 0.0)
    assert [item.content_key for item in later.items] == [item.content_key for item in jobs[1].items]


def test_a_cache_of_no_rows_keeps_nothing(make_bench: Any) -> None:
    bench = make_bench(cache_tokens=0)
    for _ in range(2):
        bench.assert_right(bench.submit(png(61, 45)))
    assert bench.runner.num_encoded == 2
    assert bench.pipeline.stats()["embed_cache_rows"] == 0


def test_waiting_images_are_batched_and_held_back(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(max_batch_patches=64)
    waiting_at_decode: list[int] = []

    def watched(*args: Any) -> PreparedImage:
        waiting_at_decode.append(bench.pipeline.stats()["embed_patches_waiting"])
        return prepare_image(*args)

    bench.close_gate()
    monkeypatch.setattr("embedding_worker.pipeline.prepare_image", watched)
    jobs = [bench.submit(png(56, 56, seed=i)) for i in range(14)]  # 16 patches each
    assert all(job.announced.wait(WAIT_S) for job in jobs)
    _until(lambda: len(waiting_at_decode) >= 9 and bench.pipeline.stats()["embed_patches_waiting"] >= 128)
    bench.open_gate()
    for job in jobs:
        bench.assert_right(job)
    assert [len(batch) for batch in bench.runner.batches[:2]] == [4, 4]
    assert max(waiting_at_decode) <= 128, "one image in hand, the rest waits until the encoder has taken a batch"


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_fails_its_own_request_only(make_bench: Any, kind: str) -> None:
    bench = make_bench(max_image_pixels=1_000_000, max_image_bytes=1_000_000)
    make, code = BAD[kind]
    bad = make()
    bench.close_gate()
    good = [bench.submit(png(61, 45)), bench.submit(png(120, 90))]
    failing = [bench.submit(png(61, 45), bad), bench.submit(bad), bench.submit(png(33, 33), png(34, 34), bad)]
    for job, place in zip(failing, (1, 0, 2), strict=True):
        assert type(job.wait().error).__name__ == code
        assert str(job.error).startswith(f"image {place}: ")
    bench.open_gate()
    for job in good:
        bench.assert_right(job)
    bench.assert_right(bench.submit(png(33, 33)))
    assert bench.pipeline.stats()["embed_failures"] == 3


def test_a_model_failure_hits_only_the_image_that_causes_it(make_bench: Any) -> None:
    bench = make_bench()
    bench.close_gate()
    bad, good = bench.submit(png(120, 90)), bench.submit(png(61, 45), png(28, 56))
    assert bad.announced.wait(WAIT_S) and good.announced.wait(WAIT_S)
    _until(lambda: bench.pipeline.stats()["embed_patches_waiting"] == 48 + 16 + 8)
    bench.runner.poison = bad.items[0].grid
    bench.open_gate()
    assert type(bad.wait().error).__name__ == "EncodeFailed"
    bench.assert_right(good)
    bench.runner.poison = None
    bench.assert_right(bench.submit(png(120, 90)))


def test_a_job_that_breaks_fails_alone(make_bench: Any) -> None:
    bench = make_bench()
    bench.close_gate()
    broken, good = bench.submit(png(61, 45), break_on_rows=True), bench.submit(png(61, 45))
    assert good.announced.wait(WAIT_S)
    bench.open_gate()
    assert "far end is gone" in str(broken.wait().error)
    bench.assert_right(good)


def test_work_that_nobody_wants_is_dropped(make_bench: Any) -> None:
    bench = make_bench()
    bench.close_gate()
    gone, kept = bench.submit(png(120, 90), png(61, 45)), bench.submit(png(61, 45))
    assert gone.announced.wait(WAIT_S) and kept.announced.wait(WAIT_S)
    _until(lambda: bench.pipeline.stats()["embed_patches_waiting"] == 48 + 16)
    gone.alive = False
    bench.open_gate()
    bench.assert_right(kept)
    assert bench.runner.num_encoded == 1, "only what the living job shares"
    assert not gone.rows and gone.summary is None and gone.error is None
    assert bench.pipeline.stats()["embed_requests_open"] == 0


def test_a_passed_deadline_fails_the_request(make_bench: Any) -> None:
    bench = make_bench()
    assert type(bench.submit(png(61, 45), deadline=time.monotonic() - 1).wait().error).__name__ == "EmbedDeadline"
    assert bench.runner.num_encoded == 0


def test_the_queue_is_bounded_by_requests_and_by_bytes(make_bench: Any) -> None:
    bench = make_bench(max_waiting_requests=3)
    bench.close_gate()
    jobs = [bench.submit(png(61, 45)), bench.submit(png(61, 45))]
    with pytest.raises(EmbedQueueFull, match="3 waiting requests"):
        bench.submit(png(61, 45))
    bench.open_gate()
    for job in jobs:
        bench.assert_right(job)
    bench.assert_right(bench.submit(png(61, 45)))
    large = png(61, 45)
    with pytest.raises(EmbedQueueFull, match="waiting bytes"):
        make_bench(max_waiting_bytes=2 * len(large) - 1).submit(large, large)


def test_closing_fails_what_is_open_and_refuses_what_comes(make_bench: Any) -> None:
    bench = make_bench()
    bench.close_gate()
    job = bench.submit(png(61, 45))
    closer = threading.Thread(target=bench.pipeline.close, daemon=True)
    closer.start()
    assert "shutting down" in str(job.wait().error)
    bench.runner.gate.set()
    closer.join(WAIT_S)
    bench.pipeline.close()
    with pytest.raises(EmbedStopped):
        bench.submit(png(61, 45))


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "int8"), ("num_threads", -1), ("max_batch_patches", 0), ("cache_tokens", True), ("min_pixels", 0)],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(EmbedConfigError, match=f"embedding.{field}"):
        EmbedConfig(**{field: value})
    with pytest.raises(EmbedConfigError, match="exceeds max_pixels"):
        EmbedConfig(min_pixels=10, max_pixels=5)


def _until(condition: Any) -> None:
    """Wait for another thread to bring about a state that has no event of its own."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "the state never came"
        threading.Event().wait(0.002)
