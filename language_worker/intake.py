"""Intake: checks on a request that need the model's sizes, before it costs anything.

Pure functions; each raises the typed error that names the field, what it holds and what would be accepted.
"""

from collections.abc import Sequence

from language_worker.api import GenerateRequest
from language_worker.canvas import BlockPlan
from language_worker.diffusion_params import DEFAULT_GENERATION_LENGTH, DiffusionParams
from language_worker.errors import InvalidRequest, MediaMismatch, PromptTooLong
from language_worker.media import MediaItem, count_placeholders
from language_worker.models.base import LanguageModel, ModelSpec
from language_worker.sampling_params import SamplingParams


def check_request(
    request: GenerateRequest,
    spec: ModelSpec,
    max_model_len: int,
    *,
    eos_ids: Sequence[int] = (),
    num_token_ids: int | None = None,
    never_ids: Sequence[int] = (),
) -> None:
    """Token ids within the vocabulary, one of them choosable, placeholders equal to media, a prompt that could fit.

    num_token_ids: ids from there on only pad the vocabulary and cannot be chosen; None: all can. never_ids: what the
    model does not write.
    """
    vocab = spec.vocab_size
    for name, ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("logit_bias", tuple(request.sampling.logit_bias)),
        ("stop_token_ids", tuple(request.sampling.stop_token_ids)),
        ("allowed_token_ids", tuple(request.sampling.allowed_token_ids or ())),
        ("banned_token_ids", tuple(request.sampling.banned_token_ids)),
    ):
        if ids and max(ids) >= vocab:
            raise InvalidRequest(f"{name} holds token id {max(ids)}; the model's ids are 0..{vocab - 1}")
    check_diffusion(request, spec, max_model_len)
    num_choosable = vocab if num_token_ids is None else min(vocab, num_token_ids)
    never = (*never_ids, *(() if spec.mask_token_id is None else (spec.mask_token_id,)))
    check_choosable(request.sampling, eos_ids, num_choosable, never_ids=never)
    count_placeholders(request.prompt_token_ids, spec.media_token_id, request.num_media)
    check_prompt_length(len(request.prompt_token_ids), max_model_len)


def check_choosable(
    params: SamplingParams, eos_ids: Sequence[int], num_token_ids: int, *, never_ids: Sequence[int] = ()
) -> None:
    """InvalidRequest when none of the first `num_token_ids` ids is left to choose by the token lists, min_tokens and,
    in a model that fills in masks, suppress_eos and what is never written (the mask for one)."""
    excluded = {*params.banned_token_ids, *never_ids}
    if params.diffusion is not None and params.diffusion.suppress_eos:
        excluded.update(eos_ids)
    if params.min_tokens:
        excluded.update(params.stop_token_ids, () if params.ignore_eos else eos_ids)
    allowed = range(num_token_ids) if params.allowed_token_ids is None else set(params.allowed_token_ids)
    if all(token_id in excluded or token_id >= num_token_ids for token_id in allowed):
        raise InvalidRequest(
            "allowed_token_ids, banned_token_ids and what is held back (by min_tokens EOS and stop_token_ids, by "
            "diffusion.suppress_eos EOS, always the mask and what the model never writes) leave no token to choose; "
            "allow more"
        )


def answer_length(params: SamplingParams, num_prompt_tokens: int, max_model_len: int) -> int:
    """Masks that the answer of a diffusion model begins with."""
    wanted = DEFAULT_GENERATION_LENGTH if params.max_tokens is None else params.max_tokens
    return min(wanted, max_model_len - num_prompt_tokens)


def check_diffusion(request: GenerateRequest, spec: ModelSpec, max_model_len: int) -> None:
    """InvalidRequest for what has no meaning where tokens are filled in, and for `diffusion` where they are not."""
    params, mask_id = request.sampling, spec.mask_token_id
    if mask_id is None:
        if params.diffusion is not None:
            raise InvalidRequest("diffusion is given and this model writes its tokens one by one; leave it out")
        return
    if mask_id in request.prompt_token_ids:
        raise InvalidRequest(f"prompt_token_ids holds the mask token {mask_id}; masks are for the answer alone")
    if params.has_penalties:
        raise InvalidRequest(
            "presence_penalty, frequency_penalty and repetition_penalty count the tokens before; a diffusion model's "
            "come in no order, so leave them out"
        )
    if params.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs has no meaning for a diffusion model, which predicts masks; leave it out")
    length = answer_length(params, len(request.prompt_token_ids), max_model_len)
    if length > 0:
        BlockPlan.of(params.diffusion or DiffusionParams(), length)


def check_items(items: tuple[MediaItem, ...], num_media: int, total_rows: int, model: LanguageModel) -> None:
    """Announced items agree with the request and, by their grids, with the rows they promise."""
    if len(items) != num_media:
        raise MediaMismatch(f"{len(items)} media items were announced for a request of {num_media}")
    for i, item in enumerate(items):
        expected = model.media_rows(item.grid)
        if expected is not None and item.rows != expected:
            raise MediaMismatch(f"media item {i} announces {item.rows} rows; grid {item.grid} makes {expected}")
    if sum(item.rows for item in items) != total_rows:
        raise MediaMismatch(f"{total_rows} rows were announced and the items add up to {sum(i.rows for i in items)}")


def check_prompt_length(num_tokens: int, max_model_len: int) -> None:
    """PromptTooLong unless one generated token still fits."""
    if num_tokens + 1 > max_model_len:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens (media included) and with one generated token exceeds the maximum "
            f"length of {max_model_len}; shorten it or use fewer or smaller images"
        )


def check_logits_size(num_tokens: int, vocab_size: int, max_bytes: int) -> None:
    """InvalidRequest when the returned logits would exceed the cap."""
    if num_tokens * vocab_size * 4 > max_bytes:
        raise InvalidRequest(
            f"return_logits would take {num_tokens} x {vocab_size} float32 = {num_tokens * vocab_size * 4} bytes; "
            f"the cap is {max_bytes} (max_logits_bytes)"
        )
