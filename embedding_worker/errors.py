"""Errors of the embedding worker. The class name is the failure code that the caller of `embed` sees.

EmbedError
├── EmbedConfigError      a setting is out of range (also a ValueError)
├── UnsupportedModel      the folder holds a model, or a variant, that this worker cannot run
├── InvalidEmbedRequest   the call itself is malformed
├── ImageError            one image of the request cannot be used; names which
│   ├── BadImage          not an image, truncated, or corrupt
│   ├── ImageTooLarge     more bytes or pixels than allowed
│   └── ImageAspect       longer than the model allows for its width
├── TooManyImages         more images in one request than allowed
├── EmbedQueueFull        too many requests, or bytes, wait already
├── OutOfResources        this machine has no memory or file descriptors left just now
├── EmbedDeadline         the request's time ran out before its embeddings were done
└── EncodeFailed          the model failed on this image
"""

from __future__ import annotations


class EmbedError(Exception):
    """Root of all errors of this package."""


class EmbedConfigError(EmbedError, ValueError):
    """A setting is out of range."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"embedding.{self.field}: {self.reason}"


class UnsupportedModel(EmbedError):
    """The folder holds a model that this worker cannot run."""

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(folder, reason)
        self.folder, self.reason = folder, reason

    def __str__(self) -> str:
        return f"model {self.folder} cannot be served: {self.reason}"


class InvalidEmbedRequest(EmbedError):
    """The call is malformed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"malformed embed call: {self.reason}"


class ImageError(EmbedError):
    """One image of the request cannot be used. index: its place in the request, from 0."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return f"image {self.index}: {self.reason}"


class BadImage(ImageError):
    """Not an image, truncated, or corrupt."""


class ImageTooLarge(ImageError):
    """More bytes or pixels than allowed."""


class ImageAspect(ImageError):
    """Longer than the model allows for its width."""


class TooManyImages(EmbedError):
    """More images in one request than allowed."""

    def __init__(self, num_images: int, limit: int) -> None:
        super().__init__(num_images, limit)
        self.num_images, self.limit = num_images, limit

    def __str__(self) -> str:
        return f"the request holds {self.num_images} images, at most {self.limit} are allowed"


class EmbedQueueFull(EmbedError):
    """Too much waits already. what: "requests" or "bytes"."""

    def __init__(self, limit: int, what: str) -> None:
        super().__init__(limit, what)
        self.limit, self.what = limit, what

    def __str__(self) -> str:
        return f"this embedding worker has its limit of {self.limit} waiting {self.what}; try again later"


class OutOfResources(EmbedError):
    """The machine has no memory or file descriptors left just now; the request is as good as before."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"this embedding worker ran out of resources: {self.reason}; try again later"


class EmbedDeadline(EmbedError):
    """The request's time ran out."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage

    def __str__(self) -> str:
        return f"the deadline of the request passed while {self.stage}"


class EmbedStopped(EmbedError):
    """The worker is shutting down."""

    def __str__(self) -> str:
        return "this embedding worker is shutting down; ask another one"


class EncodeFailed(EmbedError):
    """The model failed on an image."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the vision model failed: {self.reason}"
