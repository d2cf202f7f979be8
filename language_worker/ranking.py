"""Ranking: of `best_of` samples, the `n` with the highest mean log-probability per token.

Holds the chunks of all samples until the last has ended, since only then the best are known. Equal means go to the
lower index.
"""

from dataclasses import replace

from language_worker.api import TokenChunk
from language_worker.sampling_params import SamplingParams

CHUNKS_PER_PART = 64  # held chunks that leave as one


class Ranking:
    """Chunks of one request's samples, each with the log-probability of its tokens."""

    def __init__(self, num_samples: int) -> None:
        self._chunks: list[list[TokenChunk]] = [[] for _ in range(num_samples)]
        self._totals = [0.0] * num_samples

    def add(self, chunk: TokenChunk) -> None:
        """Hold a chunk; it must have log-probabilities."""
        assert chunk.logprobs is not None
        self._chunks[chunk.index].append(chunk)
        self._totals[chunk.index] += sum(entry.logprob for entry in chunk.logprobs)

    def best(self, params: SamplingParams) -> list[TokenChunk]:
        """The chunks of the best `params.n` samples as samples 0, 1, ..., the best first."""
        means = [
            total / max(1, sum(len(c.token_ids) for c in held))
            for total, held in zip(self._totals, self._chunks, strict=True)
        ]
        ranked = sorted(range(len(means)), key=lambda i: -means[i])[: params.n]
        prompt_logprobs = self._chunks[0][0].prompt_logprobs if self._chunks[0] else None
        parts = [
            _joined(self._chunks[i][first : first + CHUNKS_PER_PART], index, params.logprobs is not None)
            for index, i in enumerate(ranked)
            for first in range(0, len(self._chunks[i]), CHUNKS_PER_PART)
        ]
        return [replace(parts[0], prompt_logprobs=prompt_logprobs), *parts[1:]]


def _joined(chunks: list[TokenChunk], index: int, with_logprobs: bool) -> TokenChunk:
    """Neighbouring chunks of one sample as one."""
    last = chunks[-1]
    return replace(
        last,
        index=index,
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs or ()) if with_logprobs else None,
        prompt_logprobs=None,
        num_cached_tokens=chunks[0].num_cached_tokens,
        mask=tuple(m for c in chunks for m in c.mask or (1,) * len(c.token_ids))
        if any(c.mask for c in chunks)
        else None,
    )
