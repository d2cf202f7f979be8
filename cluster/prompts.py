"""What a script may hand to `LLM` -> a request's token ids and encoded media.

A prompt is a string, a list of token ids, or a map of one of them and images; a conversation is a list of OpenAI
messages. Images may be PIL images, bytes, paths or data URLs: the script runs as its user, so paths are read.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import BadRequest, ChatTemplateError
from cluster.media import parse_image_url
from cluster.model_info import ModelInfo
from cluster.served import ServedRequest
from language_worker.sampling_params import SamplingParams

NO_TIME_LIMIT_S = 30 * 24 * 3600.0
MAX_IMAGE_BYTES = 1 << 30
PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})
PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "images"})


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt and not a list of prompts."""
    if isinstance(prompts, (str, bytes, bytearray, Mapping)):  # bytes are no prompt, and no list of prompts either
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and all(type(item) is int for item in prompts)


def batch_of(value: Any, is_single: bool, param: str) -> list[Any]:
    """The prompts or conversations of a call. Raises BadRequest for what is neither one nor a list of them."""
    if is_single:
        return [value]
    if not isinstance(value, Iterable):
        raise BadRequest(f"`{param}` is one of them or a list of them, not {type(value).__name__}", param)
    return list(value)


def is_conversation(value: Any) -> bool:
    """Whether this is one list of messages."""
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def request_from_prompt(
    info: ModelInfo, prompt: Any, sampling: SamplingParams, *, return_logits: bool = False
) -> ServedRequest:
    """Raises BadRequest for anything that is no prompt, or whose placeholders and images do not match."""
    images: Sequence[Any] = ()
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - PROMPT_KEYS
        if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
            raise BadRequest("a prompt map has one of `prompt` and `prompt_token_ids`, and may have `images`", "prompt")
        images = prompt.get("images", ())
        if isinstance(images, (str, bytes, bytearray)) or not isinstance(images, Sequence):
            raise BadRequest(f"`images` is a list of images, not {type(images).__name__}", "images")
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
    if isinstance(prompt, str):
        token_ids = info.tokenizer.encode(prompt, allow_special=True, add_special_tokens=True)
    elif (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (bytes, bytearray))
        and all(type(item) is int for item in prompt)
    ):
        token_ids = list(prompt)
    else:
        raise BadRequest(f"a prompt is a string or a list of token ids, not {type(prompt).__name__}", "prompt")
    return _request(info, token_ids, images, sampling, return_logits)


def request_from_messages(
    info: ModelInfo, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams, *, return_logits: bool = False
) -> ServedRequest:
    """Raises ChatTemplateError or BadRequest."""
    if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise BadRequest("a conversation is a list of messages, each a map with a role and its content", "messages")
    if info.chat_template is None:
        raise ChatTemplateError("this model has no chat template; use generate() with a prompt", "messages")
    messages = [_with_content(message, i) for i, message in enumerate(messages)]
    pieces, media = info.chat_template.render(messages, add_generation_prompt=True)
    return _request(info, info.tokenizer.encode_prompt(pieces), media, sampling, return_logits)


def _with_content(message: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Null content is content that is not there: only an assistant that calls tools may leave it out, as over HTTP."""
    if message.get("content") is not None:
        return message
    if message.get("role") == "assistant" and message.get("tool_calls"):
        return {**message, "content": ""}
    raise BadRequest(
        f"messages[{index}].content is required in a {message.get('role')} message", f"messages[{index}].content"
    )


def image_bytes(image: Any) -> bytes:
    """Encoded bytes of one image in any accepted form. Raises BadRequest or InvalidImageUrl."""
    if isinstance(image, Mapping) and "url" in image:  # OpenAI's {"url": ...}
        image = image["url"]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, str) and image[:5].lower() == "data:":
        return parse_image_url(image, max_bytes=MAX_IMAGE_BYTES)
    if isinstance(image, (str, Path)):
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError) as error:  # a name with a NUL is no OSError
            problem = getattr(error, "strerror", error)
            raise BadRequest(f"cannot read the image {str(image)[:200]}: {problem}", "images") from error
    if hasattr(image, "save"):  # a PIL image, recognised without importing PIL
        buffer = io.BytesIO()
        try:
            (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "PNG")
        except (OSError, ValueError) as error:  # cut short, closed, without pixels
            raise BadRequest(f"cannot read an image of size {image.size}: {error}", "images") from error
        return buffer.getvalue()
    raise BadRequest(f"an image is a PIL image, bytes, a path or a data URL, not {type(image).__name__}", "images")


def _request(
    info: ModelInfo, token_ids: Sequence[int], images: Sequence[Any], sampling: SamplingParams, return_logits: bool
) -> ServedRequest:
    num_placeholders = sum(token_id == info.image_token_id for token_id in token_ids)
    if num_placeholders != len(images):
        raise BadRequest(
            f"the prompt has {num_placeholders} image placeholders and {len(images)} images; give as many of each",
            "images",
        )
    return ServedRequest(
        request_id=f"llm-{uuid.uuid4().hex}",
        prompt_token_ids=tuple(token_ids),
        media=tuple(image_bytes(image) for image in images),
        sampling=sampling,
        return_logits=return_logits,
        timeout_s=NO_TIME_LIMIT_S,
    )
