"""Refusals: what a sender hears whose stream is not, or no longer, its own to send.

Pure. A refusal says nothing of what is open here: whoever asks without the current ticket learns no more than that.
"""

from __future__ import annotations

from transfer.protocol.messages import Abort, Open, Probe


def refusal_of(message: Open | Probe) -> Abort:
    """The Abort for who opens a stream without its current ticket."""
    text = f"stream {message.stream_id}: this ticket is not valid here (wrong proof or epoch)"
    return Abort(stream_id=message.stream_id, epoch=message.epoch, code="TicketRejected", message=text)


def epoch_is_over(stream_id: str, epoch: int) -> Abort:
    """The Abort for the sender of an epoch that ended."""
    text = f"epoch {epoch} of stream {stream_id} is over"
    return Abort(stream_id=stream_id, epoch=epoch, code="TicketRejected", message=text)
