"""How segments change hands: who gets one, what is refused, and that nothing is left when an end dies or lies."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transfer.segment_values import LAYOUT, TICKET_ID, fill, filling_of, first_bytes
from tests.waiting import eventually
from transfer.errors import ConfigError, PeerLost, RemoteProtocolError, TicketRejected, TransferError
from transfer.memory import segment_passing, segment_server
from transfer.memory.segment_passing import (
    ANSWER,
    CHALLENGE,
    MAGIC,
    REQUEST,
    answer_proof,
    fetch,
    is_lifeline_over,
)
from transfer.memory.segment_passing import request_proof as prove_request
from transfer.memory.segment_server import SegmentOffer, SegmentServer
from transfer.memory.segments import OwnedSegment, attach, is_supported
from transfer.protocol.ticket import Ticket

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """AssertionError after LIMIT_S; for effects in another thread or process."""
    eventually(condition, f"waiting for {what}", LIMIT_S)


def descriptors() -> int:
    """Open ones, but for internet sockets: what is passed here is none, and those of earlier tests' peers may still be
    trying to reach somebody."""
    gc.collect()
    return sum(not _is_internet_socket(int(name)) for name in os.listdir("/proc/self/fd"))


def _is_internet_socket(descriptor: int) -> bool:
    try:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
            return False
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            return copy.family != socket.AF_UNIX
    except OSError:
        return True  # the folder's own, or closed meanwhile


@pytest.fixture(autouse=True, scope="module")
def others_are_not_searched() -> Iterator[None]:
    """Objects of earlier tests are collected once, and then left out of every collection here: there are millions."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:tandem-")


def expect_nothing_left(descriptors_before: int, mappings_before: int = sys.maxsize) -> None:
    """Soon: threads of earlier tests may open a file for a moment, or close one; what is leaked here stays."""
    eventually(
        lambda: descriptors() <= descriptors_before and mappings() <= mappings_before,
        lambda: f"{descriptors()} descriptors ({descriptors_before} before), {mappings()} mappings ({mappings_before})",
        LIMIT_S,
    )


class Host:
    """A server with one segment on offer, and how often its peers were lost."""

    def __init__(self, folder: Path) -> None:
        self.server = SegmentServer(folder)
        self.segment = OwnedSegment(LAYOUT)
        self.ticket = Ticket.issue("test")
        self.num_lost = 0
        self.server.offer(self.offer())

    def offer(self) -> SegmentOffer:
        return SegmentOffer(
            ticket=self.ticket,
            generation=self.segment.generation,
            fd=self.segment.fd,
            num_bytes=LAYOUT.num_bytes,
            on_lost=self.lost,
        )

    def lost(self) -> None:
        self.num_lost += 1

    def fetch(self, ticket: Ticket | None = None, generation: int | None = None) -> segment_passing.FetchedSegment:
        return fetch(
            self.server.path, ticket or self.ticket, self.segment.generation if generation is None else generation
        )

    def visit(self) -> tuple[socket.socket, bytes]:
        """A raw connection, and the challenge it got."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(LIMIT_S)
        sock.connect(self.server.path)
        return sock, CHALLENGE.unpack(sock.recv(4096))[1]

    def request(self, challenge: bytes, **changes: object) -> bytes:
        """The bytes of a right request, but for `changes`."""
        ticket, generation, nonce = self.ticket, self.segment.generation, bytes(32)
        fields = {
            "magic": MAGIC, "id": bytes.fromhex(ticket.stream_id), "epoch": ticket.epoch, "generation": generation,
            "nonce": nonce, "proof": prove_request(ticket, challenge, generation, nonce),
        }  # fmt: skip
        return REQUEST.pack(*{**fields, **changes}.values())

    def close(self) -> None:
        self.server.close()
        self.segment.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    gc.collect()  # what earlier tests left to it
    before = descriptors(), mappings()
    host = Host(tmp_path / "run")
    yield host
    host.close()
    expect_nothing_left(*before)
    assert not [*(tmp_path / "run").iterdir()], "no file is left"


# -- the right peer -----------------------------------------------------------------------------------------------


def test_the_holder_of_the_ticket_gets_the_memory(host: Host) -> None:
    fetched = host.fetch()
    assert fetched.num_bytes == LAYOUT.num_bytes
    peer = attach(fetched.fd, LAYOUT, host.segment.generation)
    fill(peer, host.ticket)
    assert first_bytes(host.segment) == [1, 2, 3, 4, 5]
    assert host.segment.is_sealed(range(5), filling_of(host.ticket))
    assert not is_lifeline_over(fetched.lifeline)
    wait_until(lambda: host.server.stats()["lifelines"] == 1, "the server to note the lifeline it just made")
    assert host.num_lost == 0
    fetched.close()
    peer.close()
    wait_until(lambda: host.num_lost == 1, "the end of the lifeline")
    wait_until(lambda: host.server.stats()["lifelines"] == 0, "the server to forget it")


def test_hanging_up_ends_the_lifelines_of_that_segment_only(host: Host) -> None:
    other, other_ticket = OwnedSegment(LAYOUT), Ticket.issue("test")
    host.server.offer(
        replace(host.offer(), ticket=other_ticket, generation=other.generation, fd=other.fd, on_lost=host.lost)
    )
    mine, theirs = host.fetch(), host.fetch(other_ticket, other.generation)
    host.server.hang_up(other.generation)
    wait_until(lambda: is_lifeline_over(theirs.lifeline), "the server to hang up")
    assert not is_lifeline_over(mine.lifeline) and host.num_lost == 0
    mine.close()
    theirs.close()
    other.close()
    wait_until(lambda: host.num_lost == 1, "the end of the other lifeline")


def test_a_server_that_closes_ends_every_lifeline(host: Host) -> None:
    fetched = host.fetch()
    host.server.close()
    host.server.close()
    assert is_lifeline_over(fetched.lifeline)
    fetched.close()
    with pytest.raises(PeerLost):
        host.fetch()


def test_whatever_comes_over_a_lifeline_ends_it(host: Host) -> None:
    fetched = host.fetch()
    fetched.lifeline.send(b"hello")
    wait_until(lambda: is_lifeline_over(fetched.lifeline), "the server to hang up")
    wait_until(lambda: host.num_lost == 1, "the server to say so")
    fetched.close()


def test_a_lifeline_that_speaks_is_over_at_the_peers_end_too() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    assert not is_lifeline_over(ours)
    theirs.send(b"unexpected")
    assert is_lifeline_over(ours)
    ours.close()
    assert is_lifeline_over(ours), "closed here"
    theirs.close()


# -- the wrong peer -----------------------------------------------------------------------------------------------


def test_nobody_else_gets_it(host: Host) -> None:
    stranger = Ticket.issue("test")
    wrong_secret = replace(host.ticket, secret=stranger.secret)
    for ticket, generation in (
        (wrong_secret, None),
        (stranger, None),
        (host.ticket.next_epoch(), None),
        (replace(host.ticket, epoch=2), None),
        (host.ticket, host.segment.generation ^ 1),
    ):
        with pytest.raises(TicketRejected):
            host.fetch(ticket, generation)
    expected = {"segments_passed": 0, "segments_refused": 5, "lifelines": 0, "handshakes": 0}
    wait_until(lambda: host.server.stats() == expected, f"{expected}; is {host.server.stats()}")


def test_a_withdrawn_segment_is_refused(host: Host) -> None:
    host.server.withdraw(host.ticket.stream_id)
    host.server.withdraw(host.ticket.stream_id)
    with pytest.raises(TicketRejected):
        host.fetch()


def test_a_request_is_good_for_its_own_challenge_only(host: Host) -> None:
    first, challenge = host.visit()
    request = host.request(challenge)
    first.send(request)
    data, fds, _, _ = socket.recv_fds(first, 4096, 4)
    assert ANSWER.unpack(data)[1] and len(fds) == 1, "the recorded request was a right one"
    second, _ = host.visit()
    second.send(request)
    data, more, _, _ = socket.recv_fds(second, 4096, 4)
    assert not ANSWER.unpack(data)[1] and not more
    for fd in fds:
        os.close(fd)
    first.close()
    second.close()


def test_a_request_with_any_byte_changed_gets_nothing(host: Host) -> None:
    for at in range(REQUEST.size):
        sock, challenge = host.visit()
        request = bytearray(host.request(challenge))
        request[at] ^= 0x10
        sock.send(bytes(request))
        data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
        assert not ANSWER.unpack(data)[1] and not fds, at
        assert sock.recv(1) == b"", "and it hangs up"
        sock.close()
    host.fetch().close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=3 * REQUEST.size))
def test_garbage_of_any_length_gets_nothing(host: Host, data: bytes) -> None:
    sock, _ = host.visit()
    sock.send(data)
    answer, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    assert not ANSWER.unpack(answer)[1] and not fds
    sock.close()


@pytest.mark.parametrize("length", [1, REQUEST.size - 1, REQUEST.size + 1, 60000])
def test_a_request_of_another_length_gets_nothing(host: Host, length: int) -> None:
    sock, challenge = host.visit()
    sock.send((host.request(challenge) * (length // REQUEST.size + 1))[:length])
    answer, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    assert not ANSWER.unpack(answer)[1] and not fds
    sock.close()


def test_another_user_is_refused_by_the_kernels_word(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)  # so the peer, which is this process, is another user
    with pytest.raises(TicketRejected, match="another user"):
        host.fetch()
    monkeypatch.undo()
    server_only = threading.current_thread()
    monkeypatch.setattr(os, "geteuid", lambda: real + (threading.current_thread() is not server_only))
    with pytest.raises(TicketRejected, match="refuses this process"):
        host.fetch()
    monkeypatch.undo()
    host.fetch().close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_is_refused(host: Host) -> None:
    os.chmod(Path(host.server.path).parent, 0o711)  # as if the folder's rights had failed
    os.chmod(host.server.path, 0o777)
    parents = [*Path(host.server.path).parents][1:]
    changed = [(path, path.stat().st_mode) for path in parents if not path.stat().st_mode & 1]
    for path, mode in changed:
        path.chmod(mode | 0o111)
    script = (
        "import os, socket, sys\nos.setuid(65534)\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.connect(sys.argv[1])\nprint(len(s.recv(4096)))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, host.server.path], capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        for path, mode in changed:
            path.chmod(mode)
    assert int(done.stdout) == ANSWER.size, "a refusal instead of a challenge"
    assert host.server.stats()["segments_refused"] == 1


def test_who_says_nothing_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path / "run")
    with monkeypatch.context() as hasty:
        hasty.setattr(segment_server, "HANDSHAKE_S", 0.05)
        sock, _ = host.visit()
        assert not ANSWER.unpack(sock.recv(4096))[1] and sock.recv(1) == b""
    sock.close()
    host.fetch().close()
    host.close()


def test_handshakes_are_bounded_and_others_are_served_again_afterwards(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_server, "MAX_HANDSHAKES", 3)
    silent = [host.visit()[0] for _ in range(3)]
    with pytest.raises(TicketRejected, match="refuses this process"):
        host.fetch()
    for sock in silent:
        sock.close()
    wait_until(lambda: host.server.stats()["handshakes"] == 0, "the silent ones to be forgotten")
    host.fetch().close()


# -- the wrong server ---------------------------------------------------------------------------------------------


class Impostor:
    """Answers one visitor with what it was told to."""

    def __init__(self, path: Path, answers: list[tuple[bytes, int]]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answers = answers
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sock, _ = self._listener.accept()
        with sock, open(os.devnull) as file:
            for data, num_fds in self._answers:
                if data:
                    socket.send_fds(sock, [data], [file.fileno()] * num_fds)
                if data[:4] == MAGIC and len(data) == CHALLENGE.size:
                    sock.recv(4096)

    def close(self) -> None:
        self._thread.join(LIMIT_S)
        self._listener.close()


def right_answer(ticket: Ticket, nonce: bytes) -> bytes:
    return ANSWER.pack(MAGIC, True, LAYOUT.num_bytes, answer_proof(ticket, nonce, 5, LAYOUT.num_bytes))


CHALLENGED = (CHALLENGE.pack(MAGIC, bytes(32)), 0)
GRANTED = ANSWER.pack(MAGIC, True, LAYOUT.num_bytes, bytes(32))


@pytest.mark.parametrize(
    "answers, error",
    [
        ([], PeerLost),
        ([(b"HTTP/1.1 200 OK", 0)], RemoteProtocolError),
        ([(CHALLENGE.pack(b"XXXX", bytes(32)), 0)], RemoteProtocolError),
        ([CHALLENGED], PeerLost),
        ([CHALLENGED, (GRANTED, 1)], TicketRejected),
        ([CHALLENGED, (GRANTED, 0)], TicketRejected),
        ([CHALLENGED, (GRANTED, 4)], TicketRejected),
        ([CHALLENGED, (GRANTED, 200)], RemoteProtocolError),
        ([CHALLENGED, (GRANTED[:-1], 1)], RemoteProtocolError),
        ([CHALLENGED, (GRANTED + b"x", 2)], RemoteProtocolError),
        ([CHALLENGED, (b"x", 1)], RemoteProtocolError),
        ([CHALLENGED, (ANSWER.pack(MAGIC, False, 0, bytes(32)), 1)], TicketRejected),
    ],
)
def test_whoever_answers_without_the_ticket_gets_no_rows_and_leaves_no_descriptor(
    tmp_path: Path, answers: list[tuple[bytes, int]], error: type[TransferError]
) -> None:
    before = descriptors()
    impostor = Impostor(tmp_path / "s.sock", answers)
    with pytest.raises(error):
        fetch(str(tmp_path / "s.sock"), Ticket.issue("test"), 5)
    impostor.close()
    expect_nothing_left(before)


@pytest.mark.parametrize("num_fds", [0, 2, 4])
def test_a_proven_answer_needs_exactly_one_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_fds: int
) -> None:
    ticket, before = Ticket.issue("test"), descriptors()
    monkeypatch.setattr(segment_passing.secrets, "token_bytes", bytes)  # the nonce is known beforehand
    impostor = Impostor(tmp_path / "s.sock", [CHALLENGED, (right_answer(ticket, bytes(32)), num_fds)])
    with pytest.raises(RemoteProtocolError, match=f"{num_fds} descriptors"):
        fetch(str(tmp_path / "s.sock"), ticket, 5)
    impostor.close()
    expect_nothing_left(before)


def test_waiting_is_bounded(tmp_path: Path) -> None:
    before = descriptors()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen()  # and never accepts
        with pytest.raises(PeerLost, match="timed out"):
            fetch(str(tmp_path / "s.sock"), Ticket.issue("test"), 5, timeout_s=0.05)
        with pytest.raises(PeerLost):
            fetch(str(tmp_path / "s.sock"), Ticket.issue("test"), 5, timeout_s=0.0)
    for path in (tmp_path / "nobody.sock", tmp_path, "/" + "long" * 40):
        with pytest.raises(PeerLost):
            fetch(str(path), Ticket.issue("test"), 5)
    expect_nothing_left(before)


# -- the folder ---------------------------------------------------------------------------------------------------


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    before = descriptors()
    with pytest.raises(ConfigError, match="0700"):
        SegmentServer(tmp_path / "open")
    with pytest.raises(ConfigError, match="at most"):
        SegmentServer(tmp_path / ("deep" * 30))
    expect_nothing_left(before)


def test_socket_files_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    living = Host(folder)
    half_made = folder / ".new-1-0badcafe.sock"
    old_half_made = folder / ".new-2-0badcafe.sock"
    for path in (folder / "segments-1-deadbeef.sock", half_made, old_half_made):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(str(path))
    os.utime(old_half_made, (0, 0))
    other_file = folder / "worker.sock"
    other_file.touch()
    newcomer = SegmentServer(folder)
    assert {*folder.iterdir()} == {Path(living.server.path), Path(newcomer.path), half_made, other_file}
    living.fetch().close()
    newcomer.close()
    living.close()
    assert {*folder.iterdir()} == {half_made, other_file}


# -- real processes -----------------------------------------------------------------------------------------------


class Process:
    """One end in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.segment_peer", *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(LIMIT_S)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def test_a_killed_sender_leaves_nothing_at_the_receiver(tmp_path: Path) -> None:
    gc.collect()  # what earlier tests left to it
    before = descriptors(), mappings()
    host = Host(tmp_path / "run")
    host.ticket = replace(host.ticket, stream_id=TICKET_ID)
    host.server.offer(host.offer())
    with Process("fetch", host.server.path, host.ticket.secret.hex()) as sender:
        sender.say(str(host.segment.generation))
        assert sender.hear() == "attached"
        sender.say("fill")
        assert sender.hear() == "filled"
        assert first_bytes(host.segment) == [1, 2, 3, 4, 5] and host.num_lost == 0
        sender.kill()
        wait_until(lambda: host.num_lost == 1, "the news of the death")
    assert first_bytes(host.segment) == [1, 2, 3, 4, 5], "what was sealed is still there"
    assert host.segment.is_sealed(range(5), filling_of(host.ticket))
    host.close()
    expect_nothing_left(*before)
    assert not [*(tmp_path / "run").iterdir()]


def test_a_killed_receiver_leaves_nothing_at_the_sender_and_no_file_after_the_next_start(tmp_path: Path) -> None:
    before = descriptors(), mappings()
    folder, ticket = tmp_path / "run", replace(Ticket.issue("test"), stream_id=TICKET_ID)
    with Process("serve", str(folder), ticket.secret.hex()) as receiver:
        path, generation = receiver.hear().split()
        fetched = fetch(path, ticket, int(generation))
        segment = attach(fetched.fd, LAYOUT, int(generation))
        fill(segment, ticket)
        receiver.say("check")
        assert receiver.hear() == "[1, 2, 3, 4, 5]"
        assert not is_lifeline_over(fetched.lifeline)
        receiver.kill()
        wait_until(lambda: is_lifeline_over(fetched.lifeline), "the end of the lifeline")
    fill(segment, ticket)  # the kernel keeps the memory while we map it: no signal
    segment.close()
    fetched.close()
    expect_nothing_left(*before)
    assert [file.name for file in folder.iterdir()] == [Path(path).name], "the dead cannot clean up"
    with pytest.raises(PeerLost):
        fetch(path, ticket, int(generation))
    SegmentServer(folder).close()
    assert not [*folder.iterdir()]
