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
    """token_ids, texts: what was delivered. said: the same text in one piece, while the present attempt repeats it, and
    None once it has caught up. num_tokens, num_chars: how much of it the attempt has repeated."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    is_finished: bool = False
    said: str | None = None
    num_tokens: int = 0
    num_chars: int = 0


class Delivered:
    """One request's samples."""

    def __init__(self, num_samples: int) -> None:
        self._samples = [_Sample() for _ in range(num_samples)]
        self._has_prompt_logprobs = False

    @property
    def is_begun(self) -> bool:
        """Whether anything was delivered."""
        return any(sample.texts for sample in self._samples)

    def begin_again(self) -> None:
        """Another attempt starts from the answer's beginning."""
        for sample in self._samples:
            if sample.texts:
                sample.said = "".join(sample.texts)
                sample.texts = [sample.said]
            sample.num_tokens = sample.num_chars = 0

    def add(self, chunk: TokenChunk) -> TokenChunk | None:
        """What of the chunk is to be delivered now; None if nothing is. Raises AnswerDiffers."""
        sample = self._samples[chunk.index]
        fresh = chunk if sample.said is None else self._unsaid(sample, sample.said, chunk)
        if fresh is not None:
            sample.token_ids.extend(fresh.token_ids)
            sample.texts.append(fresh.text)
            sample.is_finished = fresh.finish_reason is not None
            self._has_prompt_logprobs |= fresh.prompt_logprobs is not None
        return fresh

    def _unsaid(self, sample: _Sample, said: str, chunk: TokenChunk) -> TokenChunk | None:
        known_ids = tuple(sample.token_ids[sample.num_tokens : sample.num_tokens + len(chunk.token_ids)])
        known_text = said[sample.num_chars : sample.num_chars + len(chunk.text)]
        if chunk.token_ids[: len(known_ids)] != known_ids or not chunk.text.startswith(known_text):
            raise AnswerDiffers(f"sample {chunk.index} differs after {sample.num_tokens} tokens")
        fresh_ids, fresh_text = chunk.token_ids[len(known_ids) :], chunk.text[len(known_text) :]
        sample.num_tokens += len(known_ids)
        sample.num_chars += len(known_text)
        is_behind = sample.num_tokens < len(sample.token_ids) or sample.num_chars < len(said)
        if (is_behind and chunk.finish_reason is not None) or (sample.is_finished and (fresh_ids or fresh_text)):
            raise AnswerDiffers(f"sample {chunk.index} ends elsewhere")
        if sample.is_finished:
            return None
        if not is_behind:
            sample.said = None
        fresh = replace(
            chunk,
            token_ids=fresh_ids,
            text=fresh_text,
            logprobs=None if chunk.logprobs is None else chunk.logprobs[len(known_ids) :] or None,
            mask=None if chunk.mask is None else chunk.mask[len(known_ids) :] or None,
            preview=None if is_behind else chunk.preview,
            prompt_logprobs=None if self._has_prompt_logprobs else chunk.prompt_logprobs,
        )
        has_news = fresh_ids or fresh_text or fresh.preview is not None or fresh.prompt_logprobs is not None
        return fresh if has_news or fresh.finish_reason is not None else None
