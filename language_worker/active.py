"""ActiveRequest and Sample: what the engine keeps about a request between steps.

Builds the sequences of a request once its prompt is fully known. Holds no pages itself (the scheduler does).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from language_worker.api import GenerateRequest, RequestDone, TokenChunk, TokenLogprob
from language_worker.canvas import Canvas
from language_worker.diffusion_params import DiffusionParams
from language_worker.handover.exports import KVExport
from language_worker.handover.rows import ImportedRows, KVHeader
from language_worker.intake import answer_length
from language_worker.media import MediaItem, MediaRows, expand_prompt
from language_worker.models.base import ModelSpec, PromptPositions
from language_worker.outputs import PromptCollector
from language_worker.ranking import Ranking
from language_worker.request import MediaSpan, Sequence
from language_worker.sampler import Choice
from language_worker.sampling_params import PRIORITY_S
from language_worker.sampling_state import SamplingState
from language_worker.stop import StopChecker
from language_worker.tokenizer import Tokenizer
from language_worker.tools.machine import Toolbox, VisibleText


@dataclass(kw_only=True, slots=True)
class Sample:
    """One of a request's n samples: its sequence, how it chooses, and how it ends."""

    seq: Sequence
    state: SamplingState
    checker: StopChecker
    is_done: bool = False

    def accept(
        self, request_id: str, choices: SequenceOf[Choice], prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    ) -> TokenChunk:
        """Account for chosen tokens (in the sequence already) and show what may be seen of them; those behind the one
        that ends the output are dropped."""
        num_cached = 0 if self.state.num_generated else self.seq.num_cached
        text, num_taken = "", 0
        for choice in choices:
            num_taken += 1
            self.state.observe(choice.token_id)
            verdict = self.checker.push(choice.token_id)
            text += verdict.text
            if verdict.finish_reason is not None:
                self.is_done = True
                break
        taken = choices[:num_taken]
        return TokenChunk(
            request_id=request_id,
            index=self.state.index,
            token_ids=tuple(choice.token_id for choice in taken),
            text=text,
            finish_reason=verdict.finish_reason,
            stop_reason=verdict.stop_reason,
            logprobs=tuple(choice.logprob for choice in taken if choice.logprob is not None) or None,
            mask=tuple(int(not choice.is_forced) for choice in taken) if any(c.is_forced for c in taken) else None,
            num_prompt_tokens=self.seq.prompt_len,
            num_cached_tokens=num_cached,
            prompt_logprobs=prompt_logprobs,
        )

    def show(self, request_id: str, preview: tuple[int | None, ...]) -> TokenChunk:
        """A chunk that only shows the open block."""
        return TokenChunk(
            request_id=request_id,
            index=self.state.index,
            token_ids=(),
            text="",
            num_prompt_tokens=self.seq.prompt_len,
            preview=preview,
        )


@dataclass(kw_only=True, slots=True)
class ActiveRequest:
    """A request inside the engine. order: its age. samples: empty until its prompt is known and its rows reserved.

    export: where the KV of its prompt goes; of its answer nothing is wanted. imports_kv: that KV comes from another
    engine; `arriving` are the rows as they come, `header` says what they are, and `imported` is what was made of them.
    """

    request: GenerateRequest
    order: int
    seed: int
    submitted_at: float
    deadline: float | None
    items: tuple[MediaItem, ...] | None = None
    media: MediaRows | None = None
    export: KVExport | None = None
    imports_kv: bool = False
    header: KVHeader | None = None
    arriving: MediaRows | None = None
    imported: ImportedRows | None = None
    prompt: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    media_positions: tuple[int, ...] = ()
    media_spans: tuple[MediaSpan, ...] = ()
    samples: list[Sample] = field(default_factory=list)
    collector: PromptCollector | None = None
    ranking: Ranking | None = None
    first_token_at: float | None = None
    num_generated: int = 0
    num_restarts: int = 0  # of its media
    awaits_announcement: bool = False  # of media that come anew while the answer goes on
    is_counted: bool = False  # its prompt, in the totals

    @property
    def came_at(self) -> float:
        """When it was submitted, moved by its priority: who came first goes first."""
        return self.submitted_at + PRIORITY_S * self.request.sampling.priority

    @property
    def num_media_rows(self) -> int:
        return sum(item.rows for item in self.items or ())

    @property
    def wants_prompt_logits(self) -> bool:
        return self.request.return_logits or self.request.sampling.prompt_logprobs is not None

    @property
    def is_done(self) -> bool:
        return bool(self.samples) and all(sample.is_done for sample in self.samples)

    @property
    def has_nothing_to_compute(self) -> bool:
        """It passes its media on, and no KV."""
        canvas = self.samples[0].seq.canvas
        return canvas is not None and canvas.can_hand_over

    @property
    def num_forwards(self) -> tuple[int, int]:
        """Forwards of all canvases, and the query positions in them."""
        canvases = [sample.seq.canvas for sample in self.samples if sample.seq.canvas is not None]
        return sum(c.num_forwards for c in canvases), sum(c.num_forwarded for c in canvases)

    def states_served_by(self, index: int) -> list[SamplingState]:
        """Whose next token the next logits of sample `index` choose: all samples' at the end of the prompt."""
        state = self.samples[index].state
        return [state] if state.num_generated else [sample.state for sample in self.samples]

    def refill_media(self) -> None:
        """Its rows come anew; the answer has begun (a cache had the prompt) and goes on."""
        if self.media is not None:
            self.media.clear()
        self.awaits_announcement = True
        self.num_restarts += 1

    def replace_media(self, items: tuple[MediaItem, ...]) -> None:
        """The rows that come anew are those of `items`. Where a key is another one, KV of both may follow each other
        from here on: it has no name any more."""
        before, self.items = self.items or (), items
        is_same = [new.cache_key == old.cache_key for new, old in zip(items, before, strict=True)]
        self.media_spans = tuple(
            span if same else replace(span, key=None) for span, same in zip(self.media_spans, is_same, strict=True)
        )
        for sample in self.samples:
            sample.seq.rename(self.media_spans)
        self.awaits_announcement = False

    def forget_media(self) -> None:
        """Back to before the announcement; its sequences must have left the scheduler."""
        self.items = self.media = self.collector = self.ranking = None
        self.prompt = self.starts = self.media_positions = ()
        self.media_spans = ()
        self.samples = []
        self.num_restarts += 1

    def take_prompt_logprobs(self, index: int) -> tuple[TokenLogprob | None, ...] | None:
        """The prompt's log-probabilities, once, for the first chunk of sample 0."""
        if index or self.collector is None or self.collector.logprobs is None:
            return None
        taken, self.collector.logprobs = tuple(self.collector.logprobs), None
        return taken

    def expand(self, media_token_id: int | None) -> None:
        """The items of its media are known: the prompt with their rows in it. Raises MediaMismatch."""
        items = self.items or ()
        expanded = expand_prompt(self.request.prompt_token_ids, media_token_id, items)
        self.prompt, self.starts = expanded.token_ids, expanded.starts
        self.media_positions = expanded.media_positions
        self.media_spans = tuple(
            MediaSpan(start=start, end=start + item.rows, key=item.cache_key)
            for start, item in zip(self.starts, items, strict=True)
        )

    def report(self, now: float) -> RequestDone:
        """Every sample has ended: what it took."""
        first = now if self.first_token_at is None else self.first_token_at
        num_forwards, num_forwarded = self.num_forwards
        return RequestDone(
            request_id=self.request.request_id,
            num_prompt_tokens=len(self.prompt),
            num_generated_tokens=self.num_generated,
            ttft_ms=(first - self.submitted_at) * 1000,
            total_ms=(now - self.submitted_at) * 1000,
            num_preemptions=sum(item.seq.num_preemptions for item in self.samples),
            num_forwards=num_forwards,
            num_forwarded_tokens=num_forwarded,
        )

    def build_samples(
        self,
        tokenizer: Tokenizer,
        positions: PromptPositions | None,
        *,
        max_model_len: int,
        spec: ModelSpec,
        toolbox: Toolbox | None = None,
    ) -> list[Sequence]:
        """Create the samples; returns the sequences to begin with: the first, which computes the prompt for all of
        them, or all where each has a canvas. The prompt must fit max_model_len with one token to spare. toolbox: what
        may write into their outputs."""
        params = self.request.sampling
        if spec.mask_token_id is not None:
            max_tokens = answer_length(params, len(self.prompt), max_model_len)
        else:
            limit = 1 if self.export is not None else max_model_len - len(self.prompt)
            max_tokens = limit if params.max_tokens is None else min(params.max_tokens, limit)
        if self.wants_prompt_logits:
            self.collector = PromptCollector(
                self.prompt,
                vocab_size=spec.vocab_size,
                keep_logits=self.request.return_logits,
                num_top=params.prompt_logprobs,
            )
        if params.num_samples > params.n:
            self.ranking = Ranking(params.num_samples)
        mask_id = spec.mask_token_id
        self.samples = [
            self._sample(i, tokenizer, positions, max_tokens, mask_id, toolbox) for i in range(params.num_samples)
        ]
        return [sample.seq for sample in (self.samples[:1] if mask_id is None else self.samples)]

    def _sample(
        self,
        index: int,
        tokenizer: Tokenizer,
        positions: PromptPositions | None,
        max_tokens: int,
        mask_id: int | None,
        toolbox: Toolbox | None,
    ) -> Sample:
        params = self.request.sampling
        eos_ids: SequenceOf[int] = () if params.ignore_eos else tokenizer.eos_token_ids
        seq = Sequence(
            key=(self.order, index),
            prompt=self.prompt,
            max_len=len(self.prompt) + max_tokens,
            media_positions=self.media_positions,
            media_spans=self.media_spans,
            media=self.media,
            positions=positions,
            wants_prompt_logits=self.wants_prompt_logits and index == 0,
            has_siblings=params.num_samples > 1 and mask_id is None,
            imported=self.imported,
            is_exported=self.export is not None,
            canvas=None if mask_id is None else self._canvas(index, max_tokens, mask_id, eos_ids),
            came_at=self.came_at,
        )
        state = SamplingState(
            params,
            index=index,
            seed=self.seed,
            prompt=self.prompt,
            stop_ids=(*eos_ids, *params.stop_token_ids),
            toolbox=toolbox,
        )
        detokenizer = tokenizer.detokenizer()
        checker = StopChecker(
            detokenizer if toolbox is None else VisibleText(detokenizer, toolbox),
            max_tokens=max_tokens,
            min_tokens=params.min_tokens,
            eos_ids=eos_ids,
            stop_ids=params.stop_token_ids,
            stop_strings=params.stop_strings,
        )
        return Sample(seq=seq, state=state, checker=checker)

    def _canvas(self, index: int, length: int, mask_id: int, eos_ids: SequenceOf[int]) -> Canvas:
        params = self.request.sampling
        return Canvas(
            self.prompt,
            length,
            params.diffusion or DiffusionParams(),
            mask_id=mask_id,
            stop_ids=(*eos_ids, *params.stop_token_ids),
            min_tokens=params.min_tokens,
            needs_prompt_pass=self.wants_prompt_logits and index == 0,
            is_exported=self.export is not None,
            has_prompt_kv=self.imported is not None and self.imported.num_tokens > 0,
        )
