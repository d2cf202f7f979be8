"""KVExport: the KV of one request on its way out of a prefill engine, chunk by chunk while the prompt is computed.

The engine tells it what is final; it copies that out of the pages and writes it to the stream, so that pages never wait
for the peer. What was copied and is not yet stored at the peer is bounded by the engine's `kv_buffer_tokens`: until the
request has its share nothing of it is announced or computed. Knows nothing of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from language_worker.errors import KVStreamFailed
from language_worker.handover.rows import PLANE, KVHeader, pack_state
from transfer.errors import TransferError, error_code
from transfer.protocol.actions import StreamStats
from transfer.streams.outgoing_stream import OutgoingStream
from transfer.tensors import PlaneSpec

ReadRows = Callable[[int, int], torch.Tensor]
ReadState = Callable[[], Mapping[str, torch.Tensor]]


class KVExport:
    """One request's stream, between the engine's thread and the I/O thread."""

    def __init__(self, request_id: str, stream: OutgoingStream, plane: PlaneSpec, kv_of: str = "") -> None:
        """kv_of: what computes the KV; see `KVHeader`."""
        self.request_id = request_id
        self.is_announced = False
        self._stream = stream
        self._plane = plane
        self._kv_of = kv_of
        self._header = KVHeader(num_tokens=0)
        self._state: Mapping[str, torch.Tensor] = {}
        self._num_sent = 0

    def num_rows(self, num_tokens: int, state: Mapping[str, torch.Tensor]) -> int:
        """Rows that so many positions and this state will take."""
        return num_tokens + KVHeader.of(num_tokens, state).num_state_rows(self._plane)

    def announce(
        self, num_tokens: int, state: Mapping[str, torch.Tensor], media: Sequence[dict[str, Any]], num_masks: int = 0
    ) -> None:
        """What will come. What of `state` is recurrent is filled when the positions that it stands for are final; its
        sizes stay."""
        self.is_announced = True
        self._header, self._state = KVHeader.of(num_tokens, state, self._kv_of, num_masks), state
        self._stream.announce(self.num_rows(num_tokens, state), [self._header.to_body(), *media])

    def advance(self, kv_len: int, read: ReadRows, read_state: ReadState = dict) -> None:
        """The first `kv_len` positions are final: send those that were not sent, by `read(start, end)`, and the state
        behind the last of them, by `read_state()`. A preempted prompt is computed again; what it sent already stays as
        it was."""
        start, num_tokens = self._num_sent, self._header.num_tokens
        end = min(kv_len, num_tokens)
        if start < end:
            self._stream.write(start, {PLANE: read(start, end)})
            self._num_sent = end
        if kv_len == num_tokens and self._state:
            for name, tensor in read_state().items():
                self._state[name].copy_(tensor)
        if kv_len > num_tokens:
            self.finish()

    def finish(self) -> None:
        """What goes behind the positions is complete, too: send it, once."""
        if self._state:
            self._stream.write(self._header.num_tokens, {PLANE: pack_state(self._state, self._plane)})
            self._state = {}

    def abort(self, code: str, message: str) -> None:
        """The request is over without its KV."""
        self._stream.abort(code, message)

    def when_over(self, callback: Callable[[KVStreamFailed | None], None]) -> None:
        """Run `callback(error)` when the stream is over, at once if it is; None: the peer has every row."""

        def on_done(stream: OutgoingStream) -> None:
            try:
                stream.result(0)
            except TransferError as error:
                text = f"the KV of request {self.request_id} could not be handed over ({error_code(error)}): {error}"
                callback(KVStreamFailed(text))
            else:
                callback(None)

        self._stream.on_done(on_done)

    def stats(self) -> dict[str, int]:
        """Figures of a stream that the peer has taken."""
        sent: StreamStats = self._stream.result(0)
        return {"kv_blocks": sent.blocks, "kv_bytes": sent.num_bytes, "kv_grant_rounds": sent.grant_rounds}
