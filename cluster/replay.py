"""What of a request's answer has been delivered, and what of an answer that begins anew is still to be.

A worker that takes over computes the answer from its beginning, from the same seed, and says the same tokens; those
that were delivered are held against it and dropped. So every token is delivered once, or the request fails where the
second answer differs from the first (in bfloat16 that can happen: ties are real). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from language_worker.api import TokenChunk


class AnswerDiffers(Exception):
    """The answer that begins anew is not the one whose beginning was delivered."""


@dataclass(slots=True)
class _Sample:
    """token_ids, texts: what was delivered. num_tokens, num_chars: what the present attempt has said."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    is_finished: bool = False
    num_tokens: int = 0
    num_chars: int = 0


class Delivered:
    """One request's samples."""

    def __init__(self, num_samples: int) -> None:
        self._samples = [_Sample() for _ in range(num_samples)]
        self._is_replay = False
        self._has_prompt_logprobs = False

    @property
    def is_begun(self) -> bool:
        """Whether anything was delivered."""
        return any(sample.texts for sample in self._samples)

    def begin_again(self) -> None:
        """Another attempt starts from the answer's beginning."""
        self._is_replay = self.is_begun
        for sample in self._samples:
            sample.texts = ["".join(sample.texts)] if sample.texts else []
            sample.num_tokens = sample.num_chars = 0

    def add(self, chunk: TokenChunk) -> TokenChunk | None:
        """What of the chunk is to be delivered now; None if nothing is. Raises AnswerDiffers."""
        sample = self._samples[chunk.index]
        fresh = self._unsaid(sample, chunk) if self._is_replay else chunk
        if fresh is not None:
            sample.token_ids.extend(fresh.token_ids)
            sample.texts.append(fresh.text)
            sample.is_finished = fresh.finish_reason is not None
            self._has_prompt_logprobs |= fresh.prompt_logprobs is not None
        return fresh

    def _unsaid(self, sample: _Sample, chunk: TokenChunk) -> TokenChunk | None:
        said_ids = sample.token_ids[sample.num_tokens : sample.num_tokens + len(chunk.token_ids)]
        said_text = "".join(sample.texts)[sample.num_chars : sample.num_chars + len(chunk.text)]
        sample.num_tokens += len(chunk.token_ids)
        sample.num_chars += len(chunk.text)
        known = len(said_ids)
        if chunk.token_ids[:known] != tuple(said_ids) or not chunk.text.startswith(said_text):
            raise AnswerDiffers(f"sample {chunk.index} differs after {sample.num_tokens - len(chunk.token_ids)} tokens")
        if sample.is_finished:
            if known < len(chunk.token_ids) or len(said_text) < len(chunk.text):
                raise AnswerDiffers(f"sample {chunk.index} goes on behind its end")
            return None
        fresh = replace(
            chunk,
            token_ids=chunk.token_ids[known:],
            text=chunk.text[len(said_text) :],
            logprobs=None if chunk.logprobs is None else chunk.logprobs[known:] or None,
            mask=None if chunk.mask is None else chunk.mask[known:] or None,
            preview=None if known else chunk.preview,
            prompt_logprobs=None if self._has_prompt_logprobs else chunk.prompt_logprobs,
        )
        is_behind = sample.num_tokens < len(sample.token_ids)
        has_news = fresh.token_ids or fresh.text or fresh.finish_reason is not None or fresh.prompt_logprobs is not None
        return fresh if has_news or (fresh.preview is not None and not is_behind) else None
