"""PrefillSide: the "prefill" calls of a worker: a prompt to compute, whose KV goes to another worker.

The call is a "generate" call's body with `kv_ticket` and `receiver` besides. The stream is opened at once, so that the
grant travels while the prompt is computed. Runs on the I/O thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from language_worker.engine import Engine
from language_worker.errors import InvalidRequest, KVStreamFailed
from language_worker.handover.exports import KVExport
from transfer.config import TransferConfig
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_sender import StreamSender

STREAM_DEADLINE_SLACK_S = 5.0  # the request's own deadline comes first, and has the better error


class PrefillSide:
    """One StreamSender and the exports it carries."""

    def __init__(self, service: Service, engine: Engine, config: TransferConfig) -> None:
        self._engine = engine
        self._plane = engine.kv_plane
        self._sender = StreamSender(service, config)
        self._num_open = 0

    def open(self, request_id: str, body: Mapping[str, Any], deadline_ms: int | None) -> KVExport:
        """The export of one call. Raises InvalidRequest, or TransferError when the receiver cannot be reached."""
        address, public_key = _receiver(body.get("receiver"))
        stream = self._sender.open(
            Ticket.from_body(body.get("kv_ticket")),
            address,
            public_key,
            (self._plane,),
            deadline_s=None if deadline_ms is None else deadline_ms / 1e3 + STREAM_DEADLINE_SLACK_S,
        )
        return KVExport(request_id, stream, self._plane, self._engine.kv_of)

    def watch(self, export: KVExport) -> None:
        """Tell the engine when the export, whose request it has, is over."""

        def on_over(error: KVStreamFailed | None) -> None:
            self._num_open -= 1
            self._engine.export_over(export, error)

        self._num_open += 1
        export.when_over(on_over)

    def stats(self) -> dict[str, int]:
        """The sender's figures, and the exports that are not over."""
        return {**self._sender.stats(), "kv_exports_open": self._num_open}


def _receiver(value: object) -> tuple[str, str | None]:
    if isinstance(value, Mapping) and set(value) == {"address", "public_key"}:
        address, public_key = value["address"], value["public_key"]
        if isinstance(address, str) and isinstance(public_key, (str, type(None))):
            return address, public_key
    raise InvalidRequest("prefill needs receiver: a map of address and public_key")
