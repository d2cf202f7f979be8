"""Logging: handlers are set here, once per process, and nowhere else.

Every module logs through `logging.getLogger(__name__)`, with `%` arguments and with `request_id`, `peer` or `worker` in
`extra`; one formatter appends those fields, as text for a terminal or as one JSON object a line for a collector.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import IO

FIELDS = ("request_id", "peer", "worker")
_HANDLER_NAME = "tandem"


class TextFormatter(logging.Formatter):
    """`time level logger: message [request_id=... worker=...]`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in extra_fields(record).items())
        text = super().formatMessage(record)
        return f"{text} [{fields}]" if fields else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **extra_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(level: str = "INFO", *, as_json: bool = False, stream: IO[str] | None = None) -> None:
    """Send all records of this process to `stream` (stderr). Calling again replaces the handler, it never adds one."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == _HANDLER_NAME]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("httpx", "httpcore"):  # they log URLs, and a signed one is a credential
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """The fields of a record that were passed in `extra` and are of the agreed names."""
    return {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
