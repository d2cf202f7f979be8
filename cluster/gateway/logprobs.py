"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.gateway.context import TokenizerLike
from language_worker.api import TokenLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: TokenizerLike) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = []
    for entry in entries:
        top = [_chat_token(token_id, value, tokenizer) for token_id, value in entry.top]
        content.append({**_chat_token(entry.token_id, entry.logprob, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, tokenizer: TokenizerLike) -> dict[str, Any]:
    text, data = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(data)}


def prompt_logprobs(entries: Iterable[TokenLogprob | None], tokenizer: TokenizerLike) -> list[dict[str, Any] | None]:
    """The extension `prompt_logprobs`: per prompt token (images expanded) a map of token id to its log-probability,
    rank and text, the token itself and the most likely ones; null for the first, which nothing precedes."""
    return [None if entry is None else _ranked(entry, tokenizer) for entry in entries]


def _ranked(entry: TokenLogprob, tokenizer: TokenizerLike) -> dict[str, Any]:
    listed = [(entry.token_id, entry.logprob, entry.rank)]
    listed += [
        (token_id, value, rank) for rank, (token_id, value) in enumerate(entry.top, 1) if token_id != entry.token_id
    ]
    return {
        str(token_id): {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}
        for token_id, value, rank in listed
    }


def completion_logprobs(
    entries: Iterable[tuple[int, TokenLogprob | None]], tokenizer: TokenizerLike, offset: int
) -> tuple[dict[str, Any], int]:
    """`choices[].logprobs` of a text completion for (token id, its log-probabilities or None), whose text starts at
    character `offset` of the choice; and the offset behind it."""
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, entry in entries:
        text = tokenizer.token_text(token_id)
        result["tokens"].append(text)
        result["text_offset"].append(offset)
        result["token_logprobs"].append(None if entry is None else max(entry.logprob, LOWEST))
        top = None if entry is None else {tokenizer.token_text(i): max(value, LOWEST) for i, value in entry.top}
        result["top_logprobs"].append(top)
        offset += len(text)
    return result, offset
