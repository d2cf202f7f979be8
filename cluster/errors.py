"""Cluster errors, and the one table that turns any error of any package into an HTTP answer.

Owns the `ClusterError` tree and the mapping error name -> HTTP status + OpenAI error JSON. The mapping works by class
name, because a failure at a worker arrives as `RemoteFailure(code, message)` whose code is the class name of the far
end's error. Knows nothing of the web framework: `http_error` returns a plain value, the gateway sends it.

Tree:
    ClusterError
      ConfigError            the configuration (or the model folder) cannot be used
        NoChatTemplate
      ClientError            the request is wrong; the client can repair it
        BadRequest  UnsupportedParameter  ContextLengthExceeded  InvalidImageUrl  MediaNotAllowed  TooManyImages
        MediaFetchFailed  ImageTooLarge  ChatTemplateError  ModelNotFound  NotAuthenticated  RouteNotFound
        MethodNotAllowed  BodyTooLarge  UnsupportedMediaType  BodyTimeout
      Overloaded             no room now, try again later
      NotReady               the cluster is still starting
      NoWorker               no live worker can take the request
      WorkerLost             the worker died and no other could take over
      CrashingRequest        workers die of the request
      SlowReader             the client does not read its stream
      RequestTimeout         the request's deadline passed
      ClientGone             the client closed its connection
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from transfer.errors import RemoteFailure, StreamAborted

logger = logging.getLogger(__name__)


class ClusterError(Exception):
    """Root of the errors raised by `cluster`."""


class ConfigError(ClusterError, ValueError):
    """The configuration or the model folder cannot be used as it is."""


class NoChatTemplate(ConfigError):
    """The model folder brings no chat template."""


class ClientError(ClusterError):
    """The request is wrong. `param` names the offending field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class BadRequest(ClientError):
    """A field is missing, of a wrong type or out of range, or the body is not JSON."""


class UnsupportedParameter(ClientError):
    """A parameter that would change the answer and that this server does not implement."""


class ContextLengthExceeded(ClientError):
    """Prompt plus requested tokens do not fit the model's context."""


class InvalidImageUrl(ClientError):
    """The image URL is malformed: not a well-formed base64 `data:` URL of an image."""


class MediaNotAllowed(ClientError):
    """The media URL's scheme, host or address is not one this server reads from."""


class MediaFetchFailed(ClientError):
    """The server that the media URL names did not deliver the media."""


class TooManyImages(ClientError):
    """More images than one request may carry."""


class ImageTooLarge(ClientError):
    """An image exceeds the cap on its bytes."""


class ChatTemplateError(ClientError):
    """The checkpoint's chat template refuses these messages, or cannot render them."""


class ModelNotFound(ClientError):
    """The request names a model that is not served here."""


class NotAuthenticated(ClientError):
    """The API key is missing or wrong."""


class RouteNotFound(ClientError):
    """No such path."""


class MethodNotAllowed(ClientError):
    """The path exists, but not with this method."""


class BodyTooLarge(ClientError):
    """The request body exceeds the cap."""


class UnsupportedMediaType(ClientError):
    """The body is not declared as plain JSON."""


class BodyTimeout(ClientError):
    """The client stopped sending in the middle of its request body."""


class Overloaded(ClusterError):
    """No room for another request now."""


class NotReady(ClusterError):
    """The cluster is still starting."""


class NoWorker(ClusterError):
    """No live worker of the needed kind."""


class WorkerLost(ClusterError):
    """The worker of this request died and the request could not be moved."""


class CrashingRequest(ClusterError):
    """The request ran at several workers when they crashed; it gets no other one."""


class SlowReader(ClusterError):
    """The client reads its stream more slowly than tokens arrive, beyond the buffer."""


class RequestTimeout(ClusterError):
    """The request's deadline passed before its answer was complete."""


class ClientGone(ClusterError):
    """The client closed its connection before its answer was complete."""


INVALID = "invalid_request_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How one error name is answered. `public` replaces the error's own message where that one is not for clients."""

    status: int
    type: str
    code: str
    public: str | None = None
    retry_after_s: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpError:
    """An HTTP answer: status, OpenAI error JSON and headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def _bad(code: str, status: int = 400) -> Rule:
    return Rule(status=status, type=INVALID, code=code)


def _unavailable(code: str, public: str | None) -> Rule:
    return Rule(status=503, type="service_unavailable_error", code=code, public=public, retry_after_s=1)


_INTERNAL = Rule(
    status=500,
    type="internal_error",
    code="internal_error",
    public="the server failed on this request; please report it",
)
_LATE = Rule(
    status=504,
    type="timeout_error",
    code="deadline_exceeded",
    public="the request's deadline passed before it was answered",
)
_CRASHING = Rule(  # not of the statuses that clients answer by sending the same once more
    status=422,
    type="unprocessable_error",
    code="crashing_request",
    public="workers crashed each time they ran this request, and it is not tried again; please report it",
)
_GONE = Rule(status=499, type="cancelled_error", code="cancelled", public="the request was cancelled")
_LOST = "a worker was lost while it served this request; please send it again"
_BUSY = "the server is at its capacity; please try again shortly"

ERROR_TABLE: dict[str, Rule] = {
    # the request is wrong
    "ClientError": _bad("invalid_request"),
    "BadRequest": _bad("invalid_request"),
    "InvalidRequest": _bad("invalid_request"),
    "UnsupportedParameter": _bad("unsupported_parameter"),
    "ContextLengthExceeded": _bad("context_length_exceeded"),
    "PromptTooLong": _bad("context_length_exceeded"),
    "InvalidImageUrl": _bad("invalid_image_url"),
    "MediaNotAllowed": _bad("media_not_allowed"),
    "MediaFetchFailed": _bad("media_fetch_failed"),
    "MediaMismatch": _bad("media_mismatch"),
    "BadImage": _bad("invalid_image"),
    "ImageTooLarge": _bad("image_too_large"),
    "ImageAspect": _bad("invalid_image_aspect"),
    "MediaTooLarge": _bad("media_too_large"),
    "ImageError": _bad("invalid_image"),
    "InvalidEmbedRequest": _INTERNAL,  # the gateway speaks to the embedding worker, not the client
    "TooManyImages": _bad("too_many_images"),
    "ChatTemplateError": _bad("chat_template_error"),
    "ModelNotFound": _bad("model_not_found", 404),
    "RouteNotFound": _bad("not_found", 404),
    "MethodNotAllowed": _bad("method_not_allowed", 405),
    "BodyTimeout": _bad("request_timeout", 408),
    "BodyTooLarge": _bad("request_too_large", 413),
    "UnsupportedMediaType": _bad("unsupported_media_type", 415),
    "NotAuthenticated": Rule(status=401, type="authentication_error", code="invalid_api_key"),
    # there is no room, or something is gone: the same request may well succeed later
    "Overloaded": _unavailable("overloaded", _BUSY),
    "EmbedQueueFull": _unavailable("overloaded", _BUSY),
    "OutOfResources": _unavailable("overloaded", _BUSY),
    "QueueFull": _unavailable("overloaded", _BUSY),
    "EmbedStopped": _unavailable("worker_lost", _LOST),
    "EngineStopped": _unavailable("worker_lost", _LOST),
    "EngineFailed": _unavailable("worker_lost", _LOST),
    "MediaFailed": _unavailable("worker_lost", _LOST),
    "KVStreamFailed": _unavailable("worker_lost", _LOST),
    "KVMismatch": _unavailable("transfer_failed", _LOST),
    "PoolExhausted": _unavailable("overloaded", _BUSY),
    "NotReady": _unavailable("not_ready", None),
    "NoWorker": _unavailable("no_worker", "no worker is available for this request; please try again shortly"),
    "WorkerLost": _unavailable("worker_lost", _LOST),
    "PeerLost": _unavailable("worker_lost", _LOST),
    "StreamTimeout": _unavailable("worker_lost", _LOST),
    "StreamAborted": _unavailable("worker_lost", _LOST),
    **dict.fromkeys(
        (
            "TransferError",
            "ProtocolError",
            "LocalProtocolError",
            "RemoteProtocolError",
            "MalformedMessage",
            "Incompatible",
            "IncompatibleBlocks",
            "AlignmentError",
            "TicketRejected",
            "ResumeRejected",
            "DoubleFree",
            "ForeignOwner",
            "EndpointClosed",
            "MessageTooLarge",
        ),
        _unavailable("transfer_failed", _LOST),
    ),
    "CrashingRequest": _CRASHING,
    # time, and clients that went away
    "RequestTimeout": _LATE,
    "DeadlineExceeded": _LATE,
    "EmbedDeadline": _LATE,
    "SlowReader": Rule(status=408, type="timeout_error", code="slow_reader"),
    "Cancelled": _GONE,
    "ClientGone": _GONE,
    "ClientDisconnect": _GONE,
    # our own fault
    "ClusterError": _INTERNAL,
    "ConfigError": _INTERNAL,
    "CheckpointError": _INTERNAL,
    "NoChatTemplate": _INTERNAL,
    "RemoteFailure": _INTERNAL,
    "InternalError": _INTERNAL,
    "EmbedError": _INTERNAL,
    "EmbedConfigError": _INTERNAL,
    "UnsupportedModel": _INTERNAL,
    "EncodeFailed": _INTERNAL,
    "EngineError": _INTERNAL,
    "StepFailed": _INTERNAL,
    "IllegalTransition": _INTERNAL,
    "PageError": _INTERNAL,
    "PagesExhausted": _INTERNAL,
    "PageNotOwned": _INTERNAL,
    "ModelNotSupported": _INTERNAL,
}

_ADDRESS = re.compile(
    r"\b(?:tcp|ipc|inproc|udp|ws)://[^\s'\",;)\]]*|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\b0x[0-9a-f]{6,}\b"
)
_MAX_MESSAGE_CHARS = 2000


def rule_for(error: BaseException) -> Rule:
    """The table's row for an error: by the far end's class name, else by the nearest class in its own ancestry."""
    if isinstance(error, RemoteFailure):
        return ERROR_TABLE.get(error.code, _INTERNAL)
    if isinstance(error, StreamAborted) and error.code in ERROR_TABLE:
        return ERROR_TABLE[error.code]
    return next((ERROR_TABLE[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in ERROR_TABLE), _INTERNAL)


def http_error(error: BaseException) -> HttpError:
    """Any exception as an HTTP answer; an unknown one is a 500 that gives nothing away (it is logged instead)."""
    rule = rule_for(error)
    if rule.status == 500:
        logger.error("request failed: %s", type(error).__name__, exc_info=error)
    message = rule.public if rule.public is not None else _public_message(error)
    param = getattr(error, "param", None)
    headers = {} if rule.retry_after_s is None else {"retry-after": str(rule.retry_after_s)}
    if rule.status == 401:
        headers["www-authenticate"] = "Bearer"
    return HttpError(
        status=rule.status,
        body=error_body(message, rule.type, rule.code, param if isinstance(param, str) else None),
        headers=headers,
    )


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error JSON."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _public_message(error: BaseException) -> str:
    text = getattr(error, "message", None)
    text = text if isinstance(text, str) else str(error)
    # A lone surrogate (possible in echoed client text) must not break the encoding of the answer.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return _ADDRESS.sub("[address]", text)[:_MAX_MESSAGE_CHARS] or type(error).__name__
