"""Log formatting and set-up."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from cluster.logs import configure_logging


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_fields_are_appended_and_set_up_twice_is_set_up_once() -> None:
    stream = io.StringIO()
    for _ in range(2):
        configure_logging("info", stream=stream)
    logging.getLogger("tandem.test").info("took %d ms", 5, extra={"request_id": "r1", "worker": "w"})
    logging.getLogger("tandem.test").debug("hidden")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("INFO tandem.test: took 5 ms [request_id=r1 worker=w]")


def test_json_lines_hold_message_fields_and_exception() -> None:
    stream = io.StringIO()
    configure_logging("warning", as_json=True, stream=stream)
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("tandem.test").exception("failed\nbadly", extra={"peer": "p"})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["message"], entry["peer"]) == ("ERROR", "failed\nbadly", "p")
    assert "ValueError: inside" in entry["exception"]
