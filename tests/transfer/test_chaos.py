"""The chaos proxy on real sockets: each fault as an application meets it, exact where it promises to be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transfer.test_endpoints import wait_for
from transfer.chaos import link as chaos_link
from transfer.chaos.link import Link, Relay
from transfer.chaos.plan import FaultPlan
from transfer.chaos.proxy import ChaosProxy, Direction, Faults
from transfer.errors import ConfigError, LocalProtocolError

WAIT_S = 60.0
DATA = bytes(range(256)) * 2000


class Upstream:
    """Accepts links, keeps what each brings, echoes it when asked to, and notes how each ends."""

    def __init__(self, *, echo: bool = True, family: int = socket.AF_INET, path: str = "") -> None:
        self._echo = echo
        if family == socket.AF_UNIX:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
            self.address = f"ipc://{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received: list[bytearray] = []
        self.ends: list[str] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.received.append(bytearray())
            self._threads.append(threading.Thread(target=self._serve, args=(sock, self.received[-1]), daemon=True))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket, received: bytearray) -> None:
        with sock:
            try:
                while data := sock.recv(8192):
                    received += data
                    if self._echo:
                        sock.sendall(data)
                self.ends.append("end")
            except OSError as error:
                self.ends.append(type(error).__name__)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
        self._listener.close()


@pytest.fixture(autouse=True)
def _far_ends_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read what had left before a cut, however slow they are."""
    monkeypatch.setattr(chaos_link, "LINGER_S", WAIT_S)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.close()


def connect(proxy: ChaosProxy) -> socket.socket:
    if proxy.address.startswith("ipc://"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(proxy.address.removeprefix("ipc://"))
    else:
        host, _, port = proxy.address.removeprefix("tcp://").rpartition(":")
        sock = socket.create_connection((host, int(port)))
    sock.settimeout(WAIT_S)
    return sock


def exchange(proxy: ChaosProxy, data: bytes) -> bytes:
    """Send all from a second thread, close that way only, and read until the end, however it comes."""
    answer = bytearray()
    with connect(proxy) as sock:

        def send() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(65536):
                answer += piece
        sender.join()
    return bytes(answer)


def test_without_faults_it_is_a_plain_relay_that_keeps_half_closed_links(upstream: Upstream) -> None:
    with ChaosProxy("127.0.0.1:0", upstream.address) as proxy:
        assert exchange(proxy, DATA) == DATA
        assert exchange(proxy, b"") == b""
        wait_for(lambda: proxy.counts()["links_open"] == 0)
        counts = proxy.counts()
    assert counts["links"] == 2 and counts["bytes_up"] == counts["bytes_down"] == len(DATA)
    assert counts["cut"] == counts["bytes_swallowed"] == counts["links_failed"] == 0
    assert proxy.never_fired() == ()


def test_unix_sockets_on_both_sides(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    upstream = Upstream(family=socket.AF_UNIX, path=str(folder / "up"))
    try:
        with ChaosProxy(
            f"ipc://{folder}/near", upstream.address, Faults(cut_every_bytes=5000, direction="up")
        ) as proxy:
            exchange(proxy, DATA)
            wait_for(lambda: len(upstream.ends) == 1)
            assert bytes(upstream.received[0]) == DATA[:5000]
        assert not (folder / "near").exists()
    finally:
        upstream.close()


@pytest.mark.parametrize("offset", [1, 64, 65536, 65537, 300_000])
def test_a_cut_lets_exactly_so_many_bytes_through_and_the_next_link_works(upstream: Upstream, offset: int) -> None:
    faults = Faults(cut_after_bytes=offset, direction="up")
    with ChaosProxy("127.0.0.1:0", upstream.address, faults) as proxy:
        answer = exchange(proxy, DATA)
        assert DATA.startswith(answer) and len(answer) <= offset
        wait_for(lambda: len(upstream.ends) == 1)
        assert bytes(upstream.received[0]) == DATA[:offset]
        assert exchange(proxy, DATA) == DATA
        assert proxy.counts()["cut_after"] == proxy.counts()["cut"] == 1


def test_a_slow_reader_still_gets_all_that_left_before_the_cut() -> None:
    upstream = socket.create_server(("127.0.0.1", 0))
    offset = len(DATA) - 10
    try:
        with (
            ChaosProxy(
                "127.0.0.1:0",
                f"127.0.0.1:{upstream.getsockname()[1]}",
                Faults(cut_after_bytes=offset, direction="up"),
            ) as proxy,
            connect(proxy) as near,
        ):
            far, _ = upstream.accept()
            with far:
                far.sendall(b"never read by the other end")  # unread bytes must not turn the end into a reset
                near.sendall(DATA)
                received = bytearray()
                while piece := far.recv(1000):
                    received += piece
                assert bytes(received) == DATA[:offset]
    finally:
        upstream.close()


def test_a_dropped_segment_ends_its_link_and_the_sender_saw_no_error() -> None:
    upstream = Upstream(echo=False)
    try:
        faults = Faults(drop=1.0, segment_bytes=1000, direction="up")
        with ChaosProxy("127.0.0.1:0", upstream.address, faults, seed=5) as proxy:
            with connect(proxy) as sock:
                sock.sendall(DATA[:1000])
                with contextlib.suppress(ConnectionError):
                    while sock.recv(65536):
                        pass
            wait_for(lambda: len(upstream.ends) == 1)
            counts = proxy.counts()
            assert counts["drop"] == counts["cut"] == 1
            assert DATA.startswith(bytes(upstream.received[0]))
            assert len(upstream.received[0]) + counts["bytes_swallowed"] == 1000 and counts["bytes_swallowed"] > 0
    finally:
        upstream.close()


def test_corruption_flips_one_bit_per_segment(upstream: Upstream) -> None:
    faults = Faults(corrupt=1.0, segment_bytes=10_000, direction="up")
    with ChaosProxy("127.0.0.1:0", upstream.address, faults) as proxy:
        answer = exchange(proxy, DATA)
        assert len(answer) == len(DATA) and answer == bytes(upstream.received[0])
        wrong = [number for number, (a, b) in enumerate(zip(answer, DATA, strict=True)) if a != b]
        assert all((answer[n] ^ DATA[n]).bit_count() == 1 for n in wrong)
        assert [n // 10_000 for n in wrong] == list(range(len(DATA) // 10_000))
        assert proxy.counts()["corrupt"] == len(wrong)


def test_delay_and_throttle_fire_and_keep_the_order(upstream: Upstream) -> None:
    faults = Faults(delay_ms=5, jitter_ms=5, throttle_bytes_per_s=4_000_000, segment_bytes=1000)
    with ChaosProxy("127.0.0.1:0", upstream.address, faults) as proxy:
        assert exchange(proxy, DATA) == DATA
        counts = proxy.counts()
    assert counts["delay"] > 500 and counts["throttle"] > 2
    assert proxy.never_fired() == ()


def test_half_open_tells_neither_end(upstream: Upstream) -> None:
    faults = Faults(cut_after_bytes=1000, half_open=True, direction="up")
    with ChaosProxy("127.0.0.1:0", upstream.address, faults) as proxy:
        with connect(proxy) as sock:
            sock.sendall(DATA)
            wait_for(lambda: proxy.counts()["bytes_swallowed"] >= len(DATA) - 1000)
            sock.sendall(DATA)  # goes nowhere, and no error comes
            wait_for(lambda: proxy.counts()["bytes_swallowed"] >= 2 * len(DATA) - 1000)
            wait_for(lambda: bytes(upstream.received[0]) == DATA[:1000])
            assert not upstream.ends
            counts = proxy.counts()
            assert counts["half_open"] == counts["cut_after"] == counts["links_open"] == 1 and counts["cut"] == 0
        assert exchange(proxy, b"another link") == b"another link"
    wait_for(lambda: len(upstream.ends) == 2)


def test_reset_is_a_reset() -> None:
    upstream = Upstream(echo=False)
    try:
        faults = Faults(cut_after_bytes=1000, reset=True)
        with ChaosProxy("127.0.0.1:0", upstream.address, faults) as proxy, connect(proxy) as sock:
            sock.sendall(DATA[:1000])
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            wait_for(lambda: upstream.ends == ["ConnectionResetError"])
    finally:
        upstream.close()


def test_cut_pause_and_resume_on_demand(upstream: Upstream) -> None:
    with ChaosProxy("127.0.0.1:0", upstream.address) as proxy:
        with connect(proxy) as one, connect(proxy) as two:
            for sock in (one, two):
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
            proxy.pause()
            one.sendall(b"waits")
            one.settimeout(0.05)
            with pytest.raises(TimeoutError):
                one.recv(1)
            proxy.resume()
            one.settimeout(WAIT_S)
            assert one.recv(5) == b"waits"
            assert proxy.cut() == 2
            assert one.recv(1) == two.recv(1) == b""
        assert proxy.cut() == 0
        assert exchange(proxy, b"y") == b"y"
        assert proxy.counts()["cut"] == 2


def test_watch_sees_every_byte_and_may_cut_at_any(upstream: Upstream) -> None:
    seen: dict[tuple[int, Direction], bytearray] = {}

    def watch(link: int, direction: Direction, data: bytes) -> int | None:
        mine = seen.setdefault((link, direction), bytearray())
        before = len(mine)
        mine.extend(data)
        return 1234 - before if direction is Direction.UP and link == 0 and len(mine) >= 1234 else None

    with ChaosProxy("127.0.0.1:0", upstream.address, watch=watch) as proxy:
        exchange(proxy, DATA)
        wait_for(lambda: len(upstream.ends) == 1)
        assert bytes(upstream.received[0]) == DATA[:1234] and proxy.counts()["watch"] == 1
        assert exchange(proxy, DATA) == DATA
    assert seen[1, Direction.UP] == seen[1, Direction.DOWN] == DATA


def test_an_upstream_that_is_down_costs_the_link_only() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with ChaosProxy("127.0.0.1:0", address) as proxy:
        assert exchange(proxy, b"hello") == b""
        wait_for(lambda: proxy.counts()["links_failed"] == 1)


def test_close_ends_everything_and_leaves_nothing(upstream: Upstream) -> None:
    num_descriptors = len(os.listdir("/proc/self/fd"))
    proxy = ChaosProxy("127.0.0.1:0", upstream.address, Faults(delay_ms=1000, half_open=True, cut_every_bytes=10**6))
    proxy.start()
    socks = [connect(proxy) for _ in range(5)]
    for sock in socks:
        sock.sendall(DATA)
    wait_for(lambda: proxy.counts()["delay"] > 0 and len(upstream.received) == len(socks))
    proxy.close()
    proxy.close()
    for sock in socks:
        sock.close()
    wait_for(lambda: len(upstream.ends) == proxy.counts()["links"])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chaos ")]
    assert proxy.counts()["links_open"] == 0
    with pytest.raises(LocalProtocolError):
        proxy.cut()
    with pytest.raises(LocalProtocolError):
        proxy.start()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= num_descriptors)


def test_a_link_that_was_accepted_but_never_begun_is_closed_too(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ChaosProxy("127.0.0.1:0", upstream.address)
    accepted = threading.Event()

    def stop_at_once(link: Link, relay: Relay, near: socket.socket) -> None:
        real(link, relay, near)
        assert proxy._stop is not None
        proxy._stop.set()  # noticed before the new link's task gets its first turn
        accepted.set()

    real = Link.__init__
    monkeypatch.setattr(Link, "__init__", stop_at_once)
    proxy.start()
    with connect(proxy) as sock:
        assert accepted.wait(WAIT_S)
        proxy.close()
        assert sock.recv(1) == b""
    assert proxy.counts()["links"] == 0, "the link began: this shows nothing"


def test_a_link_cancelled_just_as_it_connects_ends(upstream: Upstream) -> None:
    async def check(near: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        port = int(upstream.address.rpartition(":")[2])
        relay = Relay(FaultPlan(Faults()), (socket.AF_INET, ("127.0.0.1", port)), None, asyncio.Event(), Counter())
        task = asyncio.create_task(Link(relay, near).run())

        async def connect_and_cancel(sock: socket.socket, address: object) -> None:
            await real(sock, address)
            task.cancel()

        real, loop.sock_connect = loop.sock_connect, connect_and_cancel  # type: ignore[method-assign]
        ended, _ = await asyncio.wait({task}, timeout=WAIT_S)
        assert ended and task.cancelled()

    near, other = socket.socketpair()
    with near, other:
        asyncio.run(check(near))


@pytest.mark.parametrize("address", ["127.0.0.1", ":80", "127.0.0.1:http", "127.0.0.1:70000", "", "tcp://", "ipc://x"])
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(ConfigError):
        ChaosProxy(address, "127.0.0.1:1")
    if not address.startswith("ipc"):
        with pytest.raises(ConfigError):
            ChaosProxy("127.0.0.1:0", address)


def test_a_taken_port_is_a_config_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:"),
    ):
        ChaosProxy(f"127.0.0.1:{taken.getsockname()[1]}", "127.0.0.1:1")


@pytest.mark.parametrize("turns", range(8))
def test_a_link_that_is_cut_while_it_ends_closes_both_its_sockets(turns: int) -> None:
    """A proxy that is closed cancels every link, also one that was on its way out."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as upstream:
            relay = Relay(
                FaultPlan(Faults()), (socket.AF_INET, upstream.getsockname()), None, asyncio.Event(), Counter()
            )
            near, other = socket.socketpair()
            with other:
                link = Link(relay, near)
                task = asyncio.create_task(link.run())
                while not link._pumps:
                    await asyncio.sleep(0)
                task.cancel()
                for _ in range(turns):  # of the loop: in one of them it waits for its pumps to end
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert link._far is not None
                assert near.fileno() == link._far.fileno() == -1

    asyncio.run(main())
