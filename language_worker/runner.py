"""ModelRunner: a StepPlan becomes tensors, the model runs once, logits come back.

The only place where token lists turn into device tensors. Keeps no state between steps but the model and its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from kernels.cpu_turn import cpu_turn
from kernels.invariance import batch_invariant
from kernels.machine import num_usable_cpus
from kernels.paged_attention import AttentionBatch
from kernels.state_batch import StateBatch
from language_worker.handover.rows import ImportedRows
from language_worker.kv_cache import KVCache
from language_worker.media import MediaRows
from language_worker.models.base import LanguageModel, MediaSpan, PromptPositions, StateStep, StepInputs
from language_worker.plan import KVImport, StateStart, StepPlan, SwapMoves, Window
from language_worker.request import Sequence as TokenSequence
from language_worker.state_store import StateStore
from language_worker.step_graphs import Asking, StepGraphs
from language_worker.step_logits import StepLogits, logit_rows, num_logits

# On the CPU torch's operations of a step run on one thread up to so many multiplications of one token-by-hidden x
# hidden-by-hidden product, where hidden x hidden weights stay in a core's cache. In float32, 32 x 192 x 896 takes
# 0.13 ms on one of two cores. A second thread would save half of that at best, and goes on spinning on the core on
# which answers are handed out: 32 sequences of the demo model then took 12 ms a step (2.3 ms on one), and 8 of them
# 64-80 ms (7.6 ms on one) at a load of 8. Layers in one call have helpers of their own, which do not
# (kernels/_native/sharing.c).
SERIAL_WORK = 1 << 21
SERIAL_WEIGHTS = 1 << 17


class ModelRunner:
    """Runs steps of one model over one cache (and its recurrent states, where it has any) on one device."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KVCache,
        device: torch.device,
        num_threads: int = 0,
        host: KVCache | None = None,
        tile_rows: int = 0,
        states: StateStore | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        """`num_threads`: torch threads of a step on the CPU, 0 for as many as the calling thread has. host: where pages
        of preempted sequences are kept. tile_rows: of batch-invariant steps; 0: steps are as quick as they can be.
        graphs: for small steps, where they can be recorded."""
        self.model = model
        self.cache = cache
        self.host = host
        self.states = states
        self.device = device
        self.graphs = graphs
        self._num_threads = num_threads
        self._num_cpus = num_usable_cpus()
        self._tile_rows = tile_rows

    @torch.inference_mode()
    def swap_pages(self, moves: SwapMoves) -> None:
        """Carry out what a plan says of host memory; before its imports, copies and windows."""
        if self.host is not None and moves.outs:
            self.cache.copy_pages_to(self.host, moves.outs)
        if self.host is not None and moves.ins:
            self.host.copy_pages_to(self.cache, moves.ins)

    @torch.inference_mode()
    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Carry out a plan's page copies; before its windows run, and once."""
        self.cache.copy_pages(copies)

    @torch.inference_mode()
    def import_rows(self, imports: Sequence[KVImport]) -> None:
        """Carry out a plan's imports; before its copies and windows."""
        for due in imports:
            kv = due.seq.imported
            assert isinstance(kv, ImportedRows)
            slots = torch.tensor(self._handed_slots(due.seq, due.start, due.end))
            self.cache.write_rows(slots, kv.rows[due.start : due.end])

    @torch.inference_mode()
    def start_states(self, starts: Sequence[StateStart]) -> None:
        """Carry out what a plan says of recurrent states; before its windows run, and once."""
        assert self.states is not None
        copies = [(start.source, start.slot) for start in starts if start.source is not None]
        if copies:
            self.states.copy(copies)
        if fresh := [start.slot for start in starts if start.source is None and start.imported is None]:
            self.states.clear(fresh)
        for start in starts:
            if start.source is None and start.imported is not None:
                assert isinstance(start.imported, ImportedRows)
                self.states.write(start.slot, start.imported.state)

    @torch.inference_mode()
    def restore_state(self, seq: TokenSequence, position: int, max_chunk: int) -> None:
        """Make the recurrent state of `seq` again, as it was before `position`, which a step that failed took on: from
        its tokens, or from where it came. Whoever wants the logits of these has them."""
        self.start_states([StateStart(slot=seq.state_slot, imported=seq.imported)])
        start = 0 if seq.imported is None else seq.imported.num_tokens
        while start < position:
            length = min(max_chunk, position - start)
            window = Window(seq=seq, start=start, length=length, num_final=length, samples=False)
            self.run(StepPlan(windows=(window,), wants_logits=False))
            start += length

    @torch.inference_mode()
    def export_state(self, seq: TokenSequence) -> dict[str, torch.Tensor]:
        """The recurrent state of a running sequence after its first `kv_len` positions: copies in host memory."""
        assert self.states is not None
        return self.states.read(seq.state_slot)

    @torch.inference_mode()
    def export_rows(self, seq: TokenSequence, start: int, end: int) -> torch.Tensor:
        """Rows [start, end) of the KV of a sequence that holds its pages: a copy in host memory."""
        return self.cache.read_rows(torch.tensor(self._handed_slots(seq, start, end), dtype=torch.int64))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Run one non-empty plan. KV of every window is written; provisional positions too."""
        windows = plan.windows
        rows, sampling, sample_rows, slices = logit_rows(windows) if plan.wants_logits else ([], (), [], ())
        if rows is None and self.graphs is not None and all(w.start >= w.seq.prompt_len for w in windows):
            logits = self.graphs.run([self._recorded_part(w) for w in windows])
            if logits is not None:
                return StepLogits(logits=logits, sampling=sampling, sample_rows=sample_rows, prompt_slices=slices)
        asking = [(w, count) for w in windows if (count := num_logits(w))]
        needs_previous = self.model.spec.needs_previous_ids
        inputs = StepInputs(
            token_ids=torch.tensor(_token_ids(windows)).to(self.device),
            positions=self._positions(windows).to(self.device),
            slots=torch.tensor([s for w in windows for s in self._slots(w.seq, w.start, w.end)]).to(self.device),
            attention=self._attention([(w, w.length) for w in windows]),
            media=self.media_spans(list(zip(windows, _offsets(windows), strict=True))),
            logit_rows=None if rows is None else torch.tensor(rows, dtype=torch.int64).to(self.device),
            last_attention=self._attention(asking) if rows else None,
            previous_ids=torch.tensor(_previous_ids(windows)).to(self.device) if needs_previous else None,
            states=self._states([(w.length, w.seq.state_slot) for w in windows]),
            num_threads=min(self._num_threads or torch.get_num_threads(), self._num_cpus),
        )
        logits = self.forward(inputs)
        return StepLogits(logits=logits, sampling=sampling, sample_rows=sample_rows, prompt_slices=slices)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one token into slot 0, which nobody may hold yet: the first step of a thread or a device sets much up."""
        one = torch.zeros(1, dtype=torch.int64)
        attention = AttentionBatch(page_table=one[:, None], query_lens=[1], kv_lens=[1], query_start=[0])
        token = one.to(self.device)
        self.forward(
            StepInputs(
                token_ids=token,
                positions=token,
                slots=token,
                attention=attention,
                media=(),
                logit_rows=None,
                previous_ids=token - 1,
                states=self._states([(1, 0)]),
            )
        )

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """The model's step, torch on one thread where a second would cost more than it brings; see SERIAL_WORK."""
        if self.device.type != "cpu":
            return self.model.forward(inputs, self.cache.layers)
        with cpu_turn(self.device):
            before = torch.get_num_threads()
            weights = self.model.spec.hidden_size**2
            is_small = weights <= SERIAL_WEIGHTS and inputs.token_ids.shape[0] * weights <= SERIAL_WORK
            is_serial = is_small and not self._tile_rows  # threads may share out a sum
            torch.set_num_threads(1 if is_serial else self._num_threads or before)  # takes 0.1 us
            try:
                with batch_invariant(self._tile_rows):
                    return self.model.forward(inputs, self.cache.layers)
            finally:
                torch.set_num_threads(before)  # threads yet to come would take it over

    def _handed_slots(self, seq: TokenSequence, start: int, end: int) -> list[int]:
        """Where the rows lie that go from engine to engine: one for each position; of a canvas one for each of its
        prompt's, version after version."""
        if seq.canvas is None:
            return self._slots(seq, start, end)
        size, versions = self.cache.page_size, range(seq.canvas.num_copies)
        tables = [seq.pages_of_copy(version, size) for version in versions]
        slots = [table[p // size] * size + p % size for table in tables for p in range(seq.prompt_len)]
        return slots[start:end]

    def _slots(self, seq: TokenSequence, position: int, end: int) -> list[int]:
        size, pages, gone = self.cache.page_size, seq.pages, seq.first_page
        assert position >= gone * size, f"{seq} was asked for positions that it gave back"
        slots: list[int] = []
        while position < end:  # page by page: [position, stop) lies in one page
            stop = min(end, (position // size + 1) * size)
            first = pages[position // size - gone] * size + position % size
            slots.extend(range(first, first + stop - position))
            position = stop
        return slots

    def _attention(self, asking: Sequence[tuple[Window, int]]) -> AttentionBatch:
        """Of the last so many positions of each window, which lie one after the other. What a sequence has given back
        no query sees, and masks know distances only: its keys are counted from those that it still has."""
        size = self.cache.page_size
        tables = [w.seq.pages[: -(-w.end // size) - w.seq.first_page] for w, _ in asking]
        width = max(map(len, tables))
        query_lens = [count for _, count in asking]
        return AttentionBatch(
            page_table=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
            query_lens=query_lens,
            kv_lens=[w.end - w.seq.first_page * size for w, _ in asking],
            query_start=[0, *accumulate(query_lens)][:-1],
        )

    def _recorded_part(self, window: Window) -> Asking:
        """Of a window behind its prompt."""
        seq, first = window.seq, window.seq.first_page * self.cache.page_size
        return Asking(
            token_ids=_token_ids((window,)),
            position=window.start,
            num_keys=window.end - first,
            pages=seq.pages,
            first=first,
            shift=_delta(window),
            previous=seq.tokens[window.start - 1],
        )

    def _states(self, windows: Sequence[tuple[int, int]]) -> StateStep | None:
        """windows: (length, slot) of each."""
        if self.states is None:
            return None
        num_single = next((i for i, (length, _) in enumerate(windows) if length > 1), len(windows))
        rest = windows[num_single:]
        return StateStep(
            layers=self.states.layers,
            single=torch.tensor([slot for _, slot in windows[:num_single]], dtype=torch.int64).to(self.device),
            batch=StateBatch(lengths=[length for length, _ in rest], slots=[slot for _, slot in rest]),
        )

    def _positions(self, windows: tuple[Window, ...]) -> torch.Tensor:
        """[T] when every token's three positions are equal, else [3, T]."""
        if all(_is_text(w) for w in windows):
            return torch.tensor([p for w in windows for p in range(w.start + _delta(w), w.end + _delta(w))])
        return torch.cat([_window_positions(w) for w in windows], dim=1)

    def media_spans(self, windows: Sequence[tuple[Window, int]]) -> tuple[MediaSpan, ...]:
        """Media of each window, whose queries begin at the step's index that comes with it."""
        spans: list[MediaSpan] = []
        for w, offset in windows:
            media = w.seq.media
            if isinstance(media, MediaRows) and w.start < w.seq.prompt_len:
                first, last = w.seq.media_rows(w.start, w.end)
                if first < last:
                    targets = torch.tensor(w.seq.media_positions[first:last]) + (offset - w.start)
                    rows, *deeper = media.rows[:, first:last]
                    spans.append(MediaSpan(targets=targets.to(self.device), rows=rows, deeper=tuple(deeper)))
        return tuple(spans)


def _offsets(windows: tuple[Window, ...]) -> list[int]:
    """Where each window's queries begin in the step."""
    return [0, *accumulate(window.length for window in windows)][:-1]


def _token_ids(windows: tuple[Window, ...]) -> list[int]:
    ids: list[int] = []
    for w in windows:
        ids += w.seq.tokens[w.start : w.end]
        ids += w.drafts
    return ids


def _previous_ids(windows: tuple[Window, ...]) -> list[int]:
    """The id before each token of the step in its sequence, -1 before a sequence's first."""
    ids: list[int] = []
    for w in windows:
        before = w.seq.tokens[w.start - 1] if w.start else -1
        ids += [before, *w.seq.tokens[w.start : w.end], *w.drafts][: w.length]
    return ids


def _delta(window: Window) -> int:
    positions = window.seq.positions
    return positions.delta if isinstance(positions, PromptPositions) else 0


def _is_text(window: Window) -> bool:
    return window.seq.positions is None or window.start >= window.seq.prompt_len


def _window_positions(window: Window) -> torch.Tensor:
    """[3, length] of a window that may cross from the prompt into generated tokens."""
    positions, prompt_len = window.seq.positions, window.seq.prompt_len
    if not isinstance(positions, PromptPositions):
        return torch.arange(window.start, window.end).expand(3, -1)
    prompt = positions.ids[:, window.start : min(window.end, prompt_len)]
    later = torch.arange(max(window.start, prompt_len), max(window.end, prompt_len)) + positions.delta
    return torch.cat([prompt, later.expand(3, -1)], dim=1)
