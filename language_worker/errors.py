"""Every error the language worker raises on purpose, under one root.

    EngineError
    ├── InvalidRequest          a field of the request is wrong
    │   ├── PromptTooLong       the prompt does not fit the model's or the cache's length
    │   ├── MediaMismatch       placeholders and announced media disagree
    │   └── MediaTooLarge       the media rows exceed the whole input buffer
    ├── MediaFailed             the embedding stream broke before its rows arrived
    ├── KVStreamFailed          the prompt's KV did not come, or could not be handed over
    │   └── KVMismatch          what came is not the KV of this request
    ├── QueueFull               more waiting requests than allowed
    ├── DeadlineExceeded        the request's time ran out
    ├── Cancelled               the client went away
    ├── EngineStopped           the engine is closing
    │   └── EngineFailed        the engine broke while it held this request
    ├── StepFailed              the model step of this request failed
    ├── IllegalTransition       a sequence was asked for a change its state forbids (our own bug)
    ├── PageError               PagesExhausted, PageNotOwned: the page pool refused
    └── ModelNotSupported       no such architecture, or a config this model cannot honour

Each takes one message, passed positionally to Exception, so that it survives a pickle round trip with its type.
"""


class EngineError(Exception):
    """Root of the language worker's errors; `args == (message,)`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def code(self) -> str:
        """Name that crosses the wire: the class name."""
        return type(self).__name__

    @property
    def message(self) -> str:
        return str(self.args[0])


class InvalidRequest(EngineError):
    """A field of the request is wrong; the message names the field, its value and what is allowed."""


class PromptTooLong(InvalidRequest):
    """The expanded prompt plus one generated token exceeds the maximum length."""


class MediaMismatch(InvalidRequest):
    """The number of placeholders, media items and announced rows do not agree."""


class MediaTooLarge(InvalidRequest):
    """One request's media rows exceed the whole input buffer."""


class MediaFailed(EngineError):
    """The embedding stream of the request failed."""


class KVStreamFailed(EngineError):
    """The stream that carries a prompt's KV from the prefill worker to the decode worker failed."""


class KVMismatch(KVStreamFailed):
    """The announced KV is not that of the request: the two workers disagree."""


class QueueFull(EngineError):
    """The waiting queue is at its bound; try again later or elsewhere."""


class DeadlineExceeded(EngineError):
    """The request's remaining time reached zero."""


class Cancelled(EngineError):
    """The request was cancelled by its owner."""


class EngineStopped(EngineError):
    """The engine is closed or closing."""


class EngineFailed(EngineStopped):
    """The engine's thread broke, and with it every request that the engine held."""


class StepFailed(EngineError):
    """The model step that held this request raised; other requests go on."""


class IllegalTransition(EngineError):
    """A sequence's state does not allow the event; the state is unchanged."""


class PageError(EngineError):
    """The page pool refused an operation; nothing was changed."""


class PagesExhausted(PageError):
    """Fewer free pages than asked for."""


class PageNotOwned(PageError):
    """A page was released by an owner that does not hold it."""


class ModelNotSupported(EngineError):
    """The checkpoint's architecture, or an option in its config, is not served."""
