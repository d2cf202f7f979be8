"""Silence: who was sent something and said nothing since."""

from __future__ import annotations

from transfer.connection import Connection
from transfer.protocol.liveness import Silence


def connection(name: str) -> Connection:
    return Connection(endpoint="tcp://here", peer=name, key=name.encode(), outgoing=True)


ONE, TWO, THREE = map(connection, ("one", "two", "three"))


def test_only_who_was_asked_and_did_not_answer_in_time_is_silent() -> None:
    silence = Silence(10.0)
    silence.sent(ONE, 0.0)
    silence.sent(TWO, 1.0)
    silence.sent(THREE, 5.0)
    silence.sent(ONE, 9.0)  # asked again: the first question counts
    silence.heard(TWO)
    assert silence.take_silent(9.9) == []
    assert silence.take_silent(10.0) == [ONE]
    assert silence.take_silent(14.9) == []
    silence.sent(ONE, 14.9)
    assert silence.take_silent(20.0) == [THREE]
    assert silence.take_silent(25.0) == [ONE]
    assert silence.take_silent(1e9) == []


def test_an_answer_ends_the_wait_and_the_next_question_begins_another() -> None:
    silence = Silence(10.0)
    silence.heard(ONE)
    silence.sent(ONE, 0.0)
    silence.heard(ONE)
    silence.sent(ONE, 8.0)
    assert silence.take_silent(17.9) == []
    assert silence.take_silent(18.0) == [ONE]
