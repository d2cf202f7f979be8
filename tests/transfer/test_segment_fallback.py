"""Whatever keeps a pair from sharing memory, its rows go over the wire, and nobody waits for what will not come."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.transfer.segment_pair import SegmentPair
from tests.transfer.test_streams import configure
from tests.transfer.virtual import Consumer, Pair, assert_rows_equal, make_rows
from tests.waiting import eventually
from transfer.errors import ConfigError, PeerLost
from transfer.memory.segment_guest import SegmentGuest
from transfer.memory.segment_host import RETRY_S, SegmentHost
from transfer.memory.segment_server import SegmentServer
from transfer.memory.segments import is_supported
from transfer.protocol.messages import Block, Filled
from transfer.protocol.ticket import Ticket

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")


class BrokenPair(Pair):
    """A pair that would share memory if `fail` did not happen at `where`."""

    has_segments = True

    def __init__(self, where: str, fail: Callable[..., NoReturn]) -> None:
        self.where, self.fail = where, fail
        self.num_failures = 0
        super().__init__(configure(16, 64, 8))

    def broken(self, *arguments: object) -> NoReturn:
        self.num_failures += 1
        self.fail(*arguments)

    def _host(self, config: object) -> SegmentHost | None:
        host = super()._host(config)  # type: ignore[arg-type]
        if host is not None and self.where == "server":
            host._open_server = self.broken
        if host is not None:
            self.make_area = host._make_area
            host._make_area = self.broken if self.where == "area" else self.make_area
        return host

    def whole(self, num_rows: int) -> Consumer:
        """A stream with all its rows, from its beginning to its end."""
        ticket = Ticket.issue("test")
        consumer, stream = self.listen(ticket), self.send(ticket)
        stream.announce(num_rows)
        stream.write(0, make_rows(num_rows))
        self.network.run_until(lambda: bool(consumer.ends))
        return consumer

    def kinds(self) -> set[type]:
        return {type(message) for _, _, message, _ in self.network.log}

    def _guest(self, service: object) -> SegmentGuest:
        fetch = self.broken if self.where == "fetch" else self.passing.fetch
        run = self.broken if self.where == "thread" else lambda job: job()
        return SegmentGuest(service, is_on=True, fetch=fetch, run=run)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("server", OSError(24, "too many open files")),
        ("server", RuntimeError("can't start new thread")),
        ("fetch", OSError(24, "too many open files")),
        ("fetch", PeerLost("nobody there")),
        ("fetch", ValueError("whatever it is")),
        ("thread", RuntimeError("can't start new thread")),
    ],
)
def test_what_cannot_be_shared_goes_over_the_wire(where: str, error: Exception) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise error

    pair = BrokenPair(where, fail)
    data = make_rows(100)
    for _ in range(2):
        ticket = Ticket.issue("test")
        consumer, stream = pair.listen(ticket), pair.send(ticket)
        stream.announce(100)
        stream.write(0, data)
        pair.network.run_until(lambda consumer=consumer: bool(consumer.ends))  # type: ignore[misc]
        assert_rows_equal(consumer, data)
    assert pair.num_failures >= 1, "nothing failed"
    assert any(isinstance(message, Block) for _, _, message, _ in pair.network.log)
    assert not pair.receiver.stats()["transfer_streams_open"]


@pytest.mark.parametrize("where", ["server", "area"])
def test_what_could_not_be_shared_once_is_tried_again_later(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise OSError(24, "too many open files")

    pair = BrokenPair(where, fail)
    assert pair.host is not None
    for is_mended in (False, False, True):
        if is_mended:
            pair.host._open_server = lambda folder: pair.passing
            pair.host._make_area = pair.make_area
        consumer = pair.whole(40)
        assert (Filled in pair.kinds()) is is_mended
        assert_rows_equal(consumer, make_rows(40))
        again = pair.whole(40)  # at once
        assert_rows_equal(again, make_rows(40))
        pair.network.advance(RETRY_S + 0.1)
    assert pair.num_failures == 2, "once in so many seconds"
    assert len(caplog.records) == 1, "and said once"


def test_no_thread_for_its_pages_costs_a_segment_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SegmentPair(configure(16, 64, 8))
    tried: list[threading.Thread] = []

    def start(thread: threading.Thread) -> NoReturn:
        tried.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    stream, consumer, data = pair.whole(200)
    assert len(tried) >= 2, "at both ends"
    assert_rows_equal(consumer, data)
    assert stream.result(0).blocks == 13


def test_a_server_without_a_thread_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    gc.collect()  # what earlier tests left to it
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(ConfigError, match="no thread"):
            SegmentServer(tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "more descriptors than before")


def test_a_folder_that_is_a_file_costs_no_stream(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("no folder")

    def fail(folder: Path) -> NoReturn:
        SegmentServer(tmp_path / "taken")
        raise AssertionError("a server in a file")

    pair = BrokenPair("server", fail)
    ticket, data = Ticket.issue("test"), make_rows(40)
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    stream.announce(40)
    stream.write(0, data)
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, data)
    assert pair.num_failures == 1
