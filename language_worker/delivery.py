"""Delivery: engine outputs become answers to the calls that wait for them.

Owns the open "generate" and "prefill" calls. One `reply_many` per step carries every token of the step that is to leave
(see `gathering.py`); ends follow, those of prefill calls when their KV has left. Called from the I/O thread (add) and
the engine's thread (deliver) only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from language_worker.api import RequestDone, RequestFailed, TokenChunk
from language_worker.errors import KVStreamFailed
from language_worker.gathering import Gathering
from language_worker.handover.exports import KVExport
from language_worker.media_stream import InputStreams
from language_worker.outputs import MediaAdmitted, Output, PromptLogits
from transfer.memory.buffers import tensor_bytes
from transfer.service.calls import IncomingCall
from transfer.service.service import Service

PROMPT_LOGPROBS_PER_PART = 2048  # a prompt's may be longer than a message: with 20 alternatives each, 600 KiB


class Delivery:
    """Open calls by request id. `max_frame_bytes`: returned logits are cut into frames of at most that size."""

    def __init__(self, service: Service, streams: InputStreams, *, max_frame_bytes: int) -> None:
        self._service = service
        self._streams = streams
        self._max_frame_bytes = max_frame_bytes
        self._calls: dict[str, IncomingCall] = {}
        self._exports: dict[str, KVExport] = {}  # of prefill calls
        self._gatherings: dict[str, Gathering] = {}
        self._told: set[str] = set()  # requests whose first part is out

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._calls

    def add(
        self, request_id: str, call: IncomingCall, export: KVExport | None = None, *, tokens_per_part: int = 1
    ) -> None:
        """Answer `call` with the outputs of `request_id`; with an export, with those of its prompt only, and end when
        the KV has left."""
        self._calls[request_id] = call
        self._gatherings[request_id] = Gathering(tokens_per_part)
        if export is not None:
            self._exports[request_id] = export

    def deliver(self, outputs: Sequence[Output]) -> None:
        """Send a step's outputs. A call whose peer is gone swallows its answers and cancels itself."""
        parts: list[tuple[IncomingCall, dict[str, Any]]] = []
        for output in outputs:
            if isinstance(output, TokenChunk):
                call = self._calls.get(output.request_id)
                if call is not None and output.request_id in self._exports:
                    self._send_prompt_logprobs(call, output)
                elif call is not None:
                    due = self._gatherings[output.request_id].add(output)
                    parts += [(call, self._body(call, chunk)) for chunk in due]
            elif isinstance(output, PromptLogits):
                self._send_logits(output)
            elif isinstance(output, MediaAdmitted):
                self._streams.admit(output.request_id, output.num_restarts)
            elif output.request_id in self._gatherings:  # its last output
                rest = self._gatherings[output.request_id].rest()
                parts += [(self._calls[output.request_id], self._body(self._calls[output.request_id], c)) for c in rest]
        if parts:
            self._service.reply_many(parts)
        for output in outputs:
            if isinstance(output, RequestDone):
                self._finish(output)
            elif isinstance(output, RequestFailed):
                self._fail(output)

    def _body(self, call: IncomingCall, chunk: TokenChunk) -> dict[str, Any]:
        """The chunk as a part; of long prompt log-probabilities it holds the last slice, the others leave before it."""
        body = chunk.to_body()
        if chunk.prompt_logprobs is not None:
            *slices, body["prompt_logprobs"] = slices_of(body["prompt_logprobs"], PROMPT_LOGPROBS_PER_PART)
            for entries in slices:
                call.reply({"prompt_logprobs_slice": entries})
        if chunk.request_id not in self._told:
            self._told.add(chunk.request_id)
            body["num_prompt_tokens"] = chunk.num_prompt_tokens
        return body

    def _send_prompt_logprobs(self, call: IncomingCall, chunk: TokenChunk) -> None:
        entries = chunk.to_body().get("prompt_logprobs")
        for part in slices_of(entries, PROMPT_LOGPROBS_PER_PART) if entries is not None else ():
            call.reply({"prompt_logprobs_slice": part})

    def _send_logits(self, output: PromptLogits) -> None:
        call = self._calls.get(output.request_id)
        if call is None:
            return
        for first_row, rows in logit_frames(output.logits, self._max_frame_bytes):
            body = {"logits_shape": list(rows.shape), "first_row": first_row, "num_rows": output.logits.shape[0]}
            call.reply(body, [tensor_bytes(rows)])

    def _finish(self, done: RequestDone) -> None:
        export = self._exports.pop(done.request_id, None)
        if export is not None:
            self._finish_prefill(done, export)
            return
        call = self._take(done.request_id)
        body: dict[str, Any] = {
            "num_prompt_tokens": done.num_prompt_tokens,
            "num_generated_tokens": done.num_generated_tokens,
            "ttft_ms": done.ttft_ms,
            "total_ms": done.total_ms,
            "num_preemptions": done.num_preemptions,
            "num_forwards": done.num_forwards,
            "num_forwarded_tokens": done.num_forwarded_tokens,
            "grant_rounds": self._streams.end(done.request_id),
        }
        if call is not None:
            call.end(body)

    def _finish_prefill(self, done: RequestDone, export: KVExport) -> None:
        """The prompt is computed: the call ends once its KV is where it goes, or cannot get there."""
        call = self._calls[done.request_id]
        body = {"prefill_ms": done.total_ms, "prefill_preemptions": done.num_preemptions}
        if done.num_forwards:
            body |= {"prefill_forwards": done.num_forwards, "prefill_forwarded_tokens": done.num_forwarded_tokens}
        self._streams.end(done.request_id)

        def on_over(error: KVStreamFailed | None) -> None:
            self._take(done.request_id)
            if error is None:
                call.end({**body, **export.stats()})
            else:
                call.fail(error.code, error.message)

        export.when_over(on_over)

    def _fail(self, failed: RequestFailed) -> None:
        call = self._take(failed.request_id)
        export = self._exports.pop(failed.request_id, None)
        if export is not None:
            export.abort(failed.error.code, failed.error.message)
        self._streams.end(failed.request_id, failed.error)
        if call is not None:
            call.fail(failed.error.code, failed.error.message)

    def _take(self, request_id: str) -> IncomingCall | None:
        self._told.discard(request_id)
        self._gatherings.pop(request_id, None)
        return self._calls.pop(request_id, None)


def slices_of(entries: list[Any], size: int) -> list[list[Any]]:
    """`entries` in order, at most `size` in each slice; one slice at least."""
    return [entries[first : first + size] for first in range(0, len(entries), size)] or [[]]


def logit_frames(logits: torch.Tensor, max_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, contiguous rows) slices of logits [n, vocab] float32, each at most `max_bytes` (one row at least)."""
    rows_per_frame = max(1, max_bytes // (logits.shape[1] * logits.element_size()))
    for first in range(0, logits.shape[0], rows_per_frame):
        yield first, logits[first : first + rows_per_frame]
