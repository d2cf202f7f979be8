"""ActiveRequest and Sample: what the engine keeps about a request between steps.

Builds the sequences of a request once its prompt is fully known. Holds no pages itself (the scheduler does).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from language_worker.api import GenerateRequest, TokenChunk, TokenLogprob
from language_worker.media import MediaItem, MediaRows
from language_worker.models.base import PromptPositions
from language_worker.outputs import PromptCollector
from language_worker.request import Sequence
from language_worker.sampler import Choice
from language_worker.sampling_state import SamplingState
from language_worker.stop import StopChecker
from language_worker.tokenizer import Tokenizer


@dataclass(kw_only=True, slots=True)
class Sample:
    """One of a request's n samples: its sequence, how it chooses, and how it ends."""

    seq: Sequence
    state: SamplingState
    checker: StopChecker
    is_done: bool = False

    def accept(
        self, request_id: str, choice: Choice, prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    ) -> TokenChunk:
        """Account for a chosen token (already appended to the sequence) and show what may be seen of it."""
        self.state.observe(choice.token_id)
        verdict = self.checker.push(choice.token_id)
        self.is_done = verdict.finish_reason is not None
        return TokenChunk(
            request_id=request_id,
            index=self.state.index,
            token_ids=(choice.token_id,),
            text=verdict.text,
            finish_reason=verdict.finish_reason,
            stop_reason=verdict.stop_reason,
            logprobs=None if choice.logprob is None else (choice.logprob,),
            num_prompt_tokens=self.seq.prompt_len,
            prompt_logprobs=prompt_logprobs,
        )


@dataclass(kw_only=True, slots=True)
class ActiveRequest:
    """A request inside the engine. order: its age. samples: empty until its prompt is known and its rows reserved."""

    request: GenerateRequest
    order: int
    seed: int
    submitted_at: float
    deadline: float | None
    items: tuple[MediaItem, ...] | None = None
    media: MediaRows | None = None
    prompt: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    media_positions: tuple[int, ...] = ()
    samples: list[Sample] = field(default_factory=list)
    collector: PromptCollector | None = None
    first_token_at: float | None = None
    num_generated: int = 0
    num_restarts: int = 0  # of its media
    is_counted: bool = False  # its prompt, in the totals

    @property
    def wants_prompt_logits(self) -> bool:
        return self.request.return_logits or self.request.sampling.prompt_logprobs is not None

    @property
    def is_done(self) -> bool:
        return bool(self.samples) and all(sample.is_done for sample in self.samples)

    def forget_media(self) -> None:
        """Back to before the announcement; its sequences must have left the scheduler."""
        self.items = self.media = self.collector = None
        self.prompt = self.starts = self.media_positions = ()
        self.samples = []
        self.num_restarts += 1

    def take_prompt_logprobs(self, index: int) -> tuple[TokenLogprob | None, ...] | None:
        """The prompt's log-probabilities, once, for the first chunk of sample 0."""
        if index or self.collector is None or self.collector.logprobs is None:
            return None
        taken, self.collector.logprobs = tuple(self.collector.logprobs), None
        return taken

    def build_samples(
        self, tokenizer: Tokenizer, positions: PromptPositions | None, *, max_model_len: int, vocab_size: int
    ) -> list[Sequence]:
        """Create the n samples; returns their sequences. The prompt must fit max_model_len with one token to spare."""
        params = self.request.sampling
        limit = max_model_len - len(self.prompt)
        max_tokens = limit if params.max_tokens is None else min(params.max_tokens, limit)
        if self.wants_prompt_logits:
            self.collector = PromptCollector(
                self.prompt,
                vocab_size=vocab_size,
                keep_logits=self.request.return_logits,
                num_top=params.prompt_logprobs,
            )
        self.samples = [self._sample(i, tokenizer, positions, max_tokens) for i in range(params.n)]
        return [sample.seq for sample in self.samples]

    def _sample(self, index: int, tokenizer: Tokenizer, positions: PromptPositions | None, max_tokens: int) -> Sample:
        params = self.request.sampling
        eos_ids: SequenceOf[int] = () if params.ignore_eos else tokenizer.eos_token_ids
        seq = Sequence(
            key=(self.order, index),
            prompt=self.prompt,
            max_len=len(self.prompt) + max_tokens,
            media_positions=self.media_positions,
            media=self.media,
            positions=positions,
            wants_prompt_logits=self.wants_prompt_logits and index == 0,
        )
        state = SamplingState(
            params,
            index=index,
            seed=self.seed,
            prompt=self.prompt,
            stop_ids=(*eos_ids, *params.stop_token_ids),
        )
        checker = StopChecker(
            tokenizer.detokenizer(),
            max_tokens=max_tokens,
            min_tokens=params.min_tokens,
            eos_ids=eos_ids,
            stop_ids=params.stop_token_ids,
            stop_strings=params.stop_strings,
        )
        return Sample(seq=seq, state=state, checker=checker)
