"""agree: symmetric in its result and in its refusals, for any two offers; and what it picks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.virtual import PLANES
from transfer.errors import Incompatible, IncompatibleBlocks
from transfer.protocol.negotiate import INTEGRITY, PAYLOAD, PROTOCOL_VERSION, Offer, Terms, agree

OFFER = Offer(block_size=128, planes=PLANES, max_frame_bytes=1 << 20, credit=16)
versions = st.tuples(*[st.integers(PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 2)] * 2).map(sorted).map(tuple)
offers = st.builds(
    Offer,
    versions=versions,
    block_size=st.sampled_from([16, 128]),
    planes=st.sampled_from([PLANES, PLANES[:1], PLANES[::-1]]),
    integrity=st.lists(st.sampled_from([*INTEGRITY, "rot13"]), unique=True).map(tuple),
    payload=st.lists(st.sampled_from([*PAYLOAD, "pigeon"]), unique=True).map(tuple),
    max_frame_bytes=st.sampled_from([10, 96, 768, 1 << 20]),
    credit=st.integers(1, 32),
)


def outcome(ours: Offer, theirs: Offer) -> Terms | tuple[type, str]:
    try:
        return agree(ours, theirs)
    except Incompatible as error:
        return type(error), str(error)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(offers, offers)
def test_agreement_and_refusal_are_symmetric(a: Offer, b: Offer) -> None:
    result = outcome(a, b)
    assert result == outcome(b, a)
    if not isinstance(result, Terms):
        return
    assert a.versions[0] <= result.version <= a.versions[1] and b.versions[0] <= result.version <= b.versions[1]
    assert a.block_size == b.block_size == result.block_size and a.planes == b.planes == result.planes
    common = set(a.integrity) & set(b.integrity)
    assert result.integrity in common and not any(
        name in common for name in INTEGRITY[: INTEGRITY.index(result.integrity)]
    )
    assert result.payload in set(a.payload) & set(b.payload)
    assert result.credit == min(a.credit, b.credit)
    assert all(plane.row_bytes * result.block_size <= result.max_frame_bytes for plane in result.planes)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(offers)
def test_an_offer_agrees_with_itself_or_cannot_be_used_at_all(offer: Offer) -> None:
    result = outcome(offer, offer)
    if isinstance(result, Terms):
        assert (result.version, result.credit) == (offer.versions[1], offer.credit)


def test_the_strongest_of_both_is_used_whatever_the_order() -> None:
    ours = replace(OFFER, integrity=("none", "xxh3-64", "aes-256-gcm"), payload=("wire", "shm"))
    assert agree(ours, replace(OFFER, integrity=("xxh3-64", "none"))).integrity == "xxh3-64"
    assert agree(ours, ours).integrity == "aes-256-gcm" and agree(ours, ours).payload == "shm"
    assert agree(ours, OFFER).payload == "wire"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"versions": (PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 2)}, Incompatible),
        ({"integrity": ("aes-256-gcm",)}, Incompatible),
        ({"payload": ("shm",)}, Incompatible),
        ({"block_size": 64}, IncompatibleBlocks),
        ({"planes": PLANES[:1]}, IncompatibleBlocks),
        ({"max_frame_bytes": 128 * 6 - 1}, IncompatibleBlocks),
    ],
)
def test_what_cannot_be_bridged_is_named(change: dict[str, object], kind: type) -> None:
    with pytest.raises(Incompatible) as caught:
        agree(OFFER, replace(OFFER, **change))  # type: ignore[arg-type]
    assert type(caught.value) is kind
