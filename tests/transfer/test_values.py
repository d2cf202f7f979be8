"""Small values: errors, configuration, planes, tickets, tags, row queues, outboxes, addresses, the key allow-list."""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.virtual import PLANES, make_rows
from transfer import errors
from transfer.config import TransferConfig
from transfer.endpoints.addresses import ZAP_DOMAIN, AllowList, check_bind_host, is_loopback, prepare_ipc
from transfer.endpoints.outbox import Outbox
from transfer.errors import (
    ConfigError,
    MessageTooLarge,
    Overloaded,
    RemoteFailure,
    StreamAborted,
    TicketRejected,
    TransferError,
)
from transfer.memory.buffers import PlaneBuffers, RowQueue, tensor_bytes
from transfer.protocol.integrity import block_tag, tag_seed
from transfer.protocol.messages import Accept
from transfer.protocol.negotiate import Offer
from transfer.protocol.ticket import Ticket, accept_is_proven, open_is_proven, proven_accept, proven_open
from transfer.tensors import DTYPE_BYTES, PlaneSpec


def tree(kind: type[TransferError]) -> list[type[TransferError]]:
    return [kind, *(k for sub in kind.__subclasses__() for k in tree(sub))]


@pytest.mark.parametrize("kind", [k for k in dict.fromkeys(tree(TransferError)) if k.__module__ == errors.__name__])
def test_every_error_survives_pickling(kind: type[TransferError]) -> None:
    coded = issubclass(kind, errors._Coded)
    error = kind("BadImage", "image 2") if coded else kind("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and again.args == error.args and str(again) == str(error)
    if coded:
        assert (again.code, again.message) == ("BadImage", "image 2")


def test_codes_come_back_as_their_errors() -> None:
    assert isinstance(errors.error_from_code("AlignmentError", "x"), errors.AlignmentError)
    assert isinstance(errors.error_from_code("MessageTooLarge", "x"), MessageTooLarge)
    assert errors.error_from_code("BadImage", "x").args == ("BadImage", "x")
    assert errors.error_code(StreamAborted("BadImage", "x")) == "BadImage"
    assert errors.error_code(RemoteFailure("PeerLost", "x")) == "PeerLost"


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_size": 0},
        {"block_size": True},
        {"block_size": 1.5},
        {"pool_tokens": -1},
        {"transport": "pigeon"},
        {"host": ""},
        {"idle_timeout_s": float("inf")},
        {"idle_timeout_s": "30"},
        {"ping_interval_s": 10.0, "peer_timeout_s": 10.0},
    ],
)
def test_wrong_configurations_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TransferConfig(**wrong)  # type: ignore[arg-type]


def test_blocks_of_a_configuration_round_up() -> None:
    config = TransferConfig(block_size=100, pool_tokens=1001, default_allocate_tokens=8000)
    assert (config.num_pool_blocks, config.default_blocks) == (11, 80)
    assert isinstance(TransferConfig(stream_timeout_s=5), TransferConfig)


@pytest.mark.parametrize(
    "wrong",
    [{"name": ""}, {"dtype": "float8"}, {"row_shape": (0,)}, {"row_shape": [3]}, {"row_shape": (1 << 40,)}],
)
def test_wrong_planes_are_refused(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"name": "x", "dtype": "float32", "row_shape": (3,)}
    with pytest.raises(ConfigError):
        PlaneSpec(**{**fields, **wrong})  # type: ignore[arg-type]


def test_tickets_are_secret_unique_and_strict() -> None:
    tickets = [Ticket.issue("me") for _ in range(100)]
    assert len({t.stream_id for t in tickets}) == len({t.secret for t in tickets}) == 100
    assert repr(tickets[0].secret) not in repr(tickets[0]) and "secret" not in repr(tickets[0])
    body = tickets[0].to_body()
    assert Ticket.from_body(body) == tickets[0]
    for wrong in (None, {}, {**body, "x": 1}, {**body, "epoch": 0}, {**body, "epoch": "1"}, {**body, "secret": b""},
                  {**body, "stream_id": "x"}, {**body, "owner": 3}, {**body, "secret": "0" * 16}):  # fmt: skip
        with pytest.raises(TicketRejected):
            Ticket.from_body(wrong)
    assert tickets[0].next_epoch().epoch == 2 and tickets[0].next_epoch().secret != tickets[0].secret


OFFER = Offer(block_size=128, planes=PLANES, max_frame_bytes=1 << 20, credit=4)
OTHER_OFFERS = (
    replace(OFFER, block_size=129),
    replace(OFFER, planes=PLANES[::-1]),
    replace(OFFER, versions=(1, 2)),
    replace(OFFER, integrity=("none",)),
    replace(OFFER, payload=("shm",)),
    replace(OFFER, max_frame_bytes=1),
    replace(OFFER, credit=5),
)


def test_a_proof_is_bound_to_everything_it_says() -> None:
    ticket = Ticket.issue("me")
    opened = proven_open(ticket, b"n" * 16, OFFER, "key", 5)
    assert open_is_proven(ticket, opened)
    changes: list[dict[str, object]] = [{"offer": other} for other in OTHER_OFFERS]
    changes += [{"nonce": b"m" * 16}, {"content_key": "other"}, {"deadline_ms": None}, {"proof": b""}, {"epoch": 2}]
    for change in changes:
        assert not open_is_proven(ticket, replace(opened, **change)), change  # type: ignore[arg-type]
    assert not open_is_proven(replace(ticket, epoch=2), opened)
    assert not open_is_proven(replace(ticket, secret=b"0" * 16), opened)


def test_the_receivers_proof_answers_one_open_and_is_bound_to_all_it_says() -> None:
    ticket = Ticket.issue("me")
    opened = proven_open(ticket, b"n" * 16, OFFER, "key", 5)
    bare = Accept(stream_id=ticket.stream_id, epoch=1, proof=b"", offer=OFFER, first_index=3)
    accept = proven_accept(ticket, bare, opened)
    assert accept_is_proven(ticket, accept, opened)
    assert accept_is_proven(ticket, accept, replace(opened, deadline_ms=4)), "a repeated Open has less time left"
    assert not accept_is_proven(ticket, replace(accept, proof=opened.proof), opened), "the Open's own proof reflected"
    changes: list[dict[str, object]] = [{"offer": other} for other in OTHER_OFFERS]
    changes += [{"first_index": 4}, {"segment": {"path": "x"}}, {"data_address": "tcp://x:1"}, {"epoch": 2}]
    for change in changes:
        assert not accept_is_proven(ticket, replace(accept, **change), opened), change  # type: ignore[arg-type]
    for other in (
        replace(opened, nonce=b"m" * 16),
        replace(opened, content_key="k"),
        replace(opened, offer=OTHER_OFFERS[0]),
    ):
        assert not accept_is_proven(ticket, accept, other)
    assert not accept_is_proven(replace(ticket, secret=b"0" * 16), accept, opened)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(0, 99), st.integers(0, 7))
def test_a_tag_changes_with_every_field_and_every_bit(field: int, byte: int, bit: int) -> None:
    ticket = Ticket.issue("me")
    seed, values, payload = tag_seed(ticket), [1, 2, 3, 4, 5, 6], bytes(100)
    tag = block_tag(seed, ticket.stream_id, *values, [payload])  # type: ignore[arg-type]
    assert tag == block_tag(seed, ticket.stream_id, *values, [payload[:40], payload[40:]])  # type: ignore[arg-type]
    values[field] += 1
    assert tag != block_tag(seed, ticket.stream_id, *values, [payload])  # type: ignore[arg-type]
    values[field] -= 1
    damaged = bytearray(payload)
    damaged[byte] ^= 1 << bit
    assert tag != block_tag(seed, ticket.stream_id, *values, [bytes(damaged)])  # type: ignore[arg-type]
    other = tag_seed(replace(ticket, epoch=2))
    assert tag != block_tag(other, ticket.stream_id, *values, [payload])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype_goes_through_a_block_bit_for_bit(dtype: str) -> None:
    plane = PlaneSpec(name="x", dtype=dtype, row_shape=(2, 3))
    torch_dtype = getattr(torch, dtype)
    raw = torch.randint(0, 2, (5, 2, 3)).to(torch_dtype)
    buffers = PlaneBuffers(3, 8, (plane,))
    frame = tensor_bytes(raw)
    assert len(frame) == 5 * plane.row_bytes
    buffers.place(1, [frame])
    assert torch.equal(buffers.rows(1, 5)["x"], raw)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_a_row_queue_gives_any_range(cuts: list[int], data: st.DataObject) -> None:
    total = sum(cuts)
    rows, queue, start = make_rows(total), RowQueue(PLANES), 0
    for count in cuts:
        num_rows, chunk = queue.check({name: tensor[start : start + count] for name, tensor in rows.items()})
        queue.append(num_rows, chunk)
        start += count
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    queue.release(first)
    frames = queue.frames(first, last - first)
    expected = [tensor_bytes(rows[plane.name][first:last].contiguous()) for plane in PLANES]
    assert [bytes(f) for f in frames] == [bytes(e) for e in expected]


def test_frames_inside_one_write_are_not_copied() -> None:
    rows, queue = make_rows(32), RowQueue(PLANES)
    queue.append(*queue.check(rows))
    frame = queue.frames(4, 8)[0]
    rows["embeddings"][4] = 1.0
    assert bytes(frame[:6]) == bytes(tensor_bytes(rows["embeddings"][4]))


def test_an_outbox_is_bounded_both_ways() -> None:
    outbox = Outbox("peer", 3, 100)
    with pytest.raises(MessageTooLarge, match="101 bytes"):
        outbox.put([b"0" * 60, b"0" * 41])
    outbox.put([b"0" * 60, b"0" * 40])
    with pytest.raises(Overloaded, match="peer"):
        outbox.put([b"1"])
    outbox.pop()
    for _ in range(3):
        outbox.put([b"1"])
    with pytest.raises(Overloaded):
        outbox.put([b"1"])
    outbox.clear()
    assert len(outbox) == 0 and outbox.head() is None


def test_addresses() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("127.8.0.1") and is_loopback("[::1]") and is_loopback("localhost")
    assert not is_loopback("10.0.0.1") and not is_loopback("example.org")
    for everywhere in ("tcp://*:1", "tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://127.0.0.1", "tcp://127.0.0.1:99999"):
        with pytest.raises(ConfigError):
            check_bind_host(everywhere)


def test_an_ipc_folder_is_private(tmp_path: Path) -> None:
    prepare_ipc(f"ipc://{tmp_path}/new/a.sock")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    os.chmod(tmp_path / "new", 0o755)
    with pytest.raises(ConfigError, match="0700"):
        prepare_ipc(f"ipc://{tmp_path}/new/a.sock")
    for wrong in ("ipc://relative/a.sock", f"ipc:///{'x' * 200}"):
        with pytest.raises(ConfigError, match="absolute"):
            prepare_ipc(wrong)


def test_the_allow_list_lets_in_listed_keys_only() -> None:
    allow = AllowList()
    request = [b"1.0", b"id", ZAP_DOMAIN, b"10.0.0.1", b"", b"CURVE", b"k" * 32]
    assert allow.answer(request)[2] == b"400"
    allow.replace([b"k" * 32])
    assert allow.answer(request) == [b"1.0", b"id", b"200", b"OK", b"peer", b""]
    for position, value in ((0, b"2.0"), (2, b"other"), (5, b"NULL"), (5, b"PLAIN"), (6, b"x" * 32)):
        changed = list(request)
        changed[position] = value
        assert allow.answer(changed)[2] == b"400"
    assert allow.answer([])[2] == allow.answer(request[:-1])[2] == b"400"
    assert allow.num_refused == 8


def test_a_pool_lies_in_large_pages_where_there_are_any_each_plane_on_a_page_of_its_own() -> None:
    odd, wide = PlaneSpec(name="odd", dtype="int8", row_shape=(3,)), PlaneSpec(name="x", dtype="float64", row_shape=())
    buffers = PlaneBuffers(64, 8191, (PLANES[0], odd, wide))
    rows = [buffers.rows(block_id, 8191) for block_id in range(64)]
    for number, views in enumerate(rows):
        for view in views.values():
            view.fill_(number)
    assert all((view == number).all() for number, views in enumerate(rows) for view in views.values()), "none overlap"
    starts = [view.data_ptr() for view in rows[0].values()]
    assert all(start % 4096 == 0 for start in starts)
    smaps = Path("/proc/self/smaps")
    if not Path("/sys/kernel/mm/transparent_hugepage").exists() or not smaps.exists():
        return
    flags, is_ours = "", False
    for line in smaps.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_ours = int(found[1], 16) <= starts[0] < int(found[2], 16)
        elif line.startswith("VmFlags:") and is_ours:
            flags = line
    assert " hg" in flags, "large pages were asked for"


@pytest.mark.parametrize("num_blocks", [1 << 26, 1 << 40])
def test_a_pool_that_no_machine_has_is_a_wrong_configuration(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=r"transfer\.pool_tokens"):
        PlaneBuffers(num_blocks, 1 << 20, PLANES)
