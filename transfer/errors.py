"""Every error that leaves this package, as one tree.

    TransferError
    ├── ConfigError (also a ValueError)
    ├── ProtocolError
    │   ├── LocalProtocolError        this side broke the protocol: a bug at the caller
    │   │   └── MessageTooLarge
    │   └── RemoteProtocolError       the peer broke it
    │       └── MalformedMessage
    ├── Incompatible                  the two ends cannot work together
    │   └── IncompatibleBlocks        they disagree on block size, planes or an allocation
    │       └── AlignmentError
    ├── TicketRejected · ResumeRejected
    ├── PoolExhausted · DoubleFree · ForeignOwner
    ├── PeerLost · Overloaded · EndpointClosed · StreamTimeout
    └── StreamAborted(code, message) · RemoteFailure(code, message)

Each class passes all its arguments to `Exception.__init__`, so that it survives pickling with its type and fields.
Knows nothing of sockets, messages or tensors.
"""

from __future__ import annotations


class TransferError(Exception):
    """Root of the tree. The message says what happened, to what, and what to do."""


class ConfigError(TransferError, ValueError):
    """A configuration value cannot be used."""


class ProtocolError(TransferError):
    """A step that the protocol does not allow."""


class LocalProtocolError(ProtocolError):
    """This side asked for something the protocol forbids."""


class MessageTooLarge(LocalProtocolError):
    """A message to be sent exceeds the configured byte caps."""


class RemoteProtocolError(ProtocolError):
    """The peer did something the protocol forbids."""


class MalformedMessage(RemoteProtocolError):
    """Bytes from a peer do not decode to a message of this version."""


class Incompatible(TransferError):
    """The two ends have no protocol version, integrity or payload path in common."""


class IncompatibleBlocks(Incompatible):
    """The two ends disagree on block size, planes or content of an allocation."""


class AlignmentError(IncompatibleBlocks):
    """An allocation is not whole blocks: allocated_tokens != len(block_ids) * block_size."""


class TicketRejected(TransferError):
    """A ticket is malformed, its proof is wrong or its epoch is not the current one."""


class ResumeRejected(TransferError):
    """A sender that takes a stream over does not go on with the same content."""


class PoolExhausted(TransferError):
    """The block pool has too few free blocks; nothing was allocated."""


class DoubleFree(TransferError):
    """Blocks were freed that are free already; nothing was freed."""


class ForeignOwner(TransferError):
    """Blocks were freed by someone who does not own them; nothing was freed."""


class PeerLost(TransferError):
    """The peer is gone, silent for too long, or cannot be reached."""


class Overloaded(TransferError):
    """A bounded queue or table is full; try later or elsewhere."""


class EndpointClosed(TransferError):
    """The endpoint was closed on this side."""


class StreamTimeout(TransferError):
    """A stream made no progress, or its peer was silent, for longer than configured."""


class _Coded(TransferError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class StreamAborted(_Coded):
    """A stream was ended before its last row, by either side, for a reason outside this package."""


class RemoteFailure(_Coded):
    """A call failed. `code` is the class name of the error at the far end, or PeerLost, Cancelled, ..."""


_BY_CODE: dict[str, type[TransferError]] = {
    kind.__name__: kind
    for kind in (
        ProtocolError, LocalProtocolError, RemoteProtocolError, Incompatible, IncompatibleBlocks, AlignmentError,
        MessageTooLarge, TicketRejected, ResumeRejected, PeerLost, Overloaded, EndpointClosed, StreamTimeout,
    )
}  # fmt: skip


# A sender's Abort with one of these says that the sender is gone, not that the stream's content is bad.
LOSS_CODES = frozenset({"EndpointClosed", "PeerLost", "EmbedStopped", "StreamTimeout"})


def error_code(error: Exception) -> str:
    """The code under which `error` travels: its own code, or its class name."""
    return error.code if isinstance(error, _Coded) else type(error).__name__


def error_from_code(code: str, message: str) -> TransferError:
    """The error to raise here for an abort received from the peer; unknown codes become StreamAborted."""
    kind = _BY_CODE.get(code)
    return StreamAborted(code, message) if kind is None else kind(f"reported by the peer: {message}")
