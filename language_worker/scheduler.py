"""Scheduler: which query positions run in the next step, and whose pages pay for them.

Pure: sequences in, a StepPlan out; no tensors, clock or threads. Owns the waiting and running lists and the page pool.

Rules, in order
 1. Age decides. A request's age is fixed at submission and survives preemption.
 2. Every running sequence that misses one token gets it (decodes), oldest first; when a page is lacking, the youngest
    of those that can only wait for media rows is preempted, else the youngest of all: it loses its KV (`kv_len = 0`)
    and waits again under its old age.
 3. What is left of `max_step_tokens` goes to running prefills, oldest first, in chunks. One whose media rows have not
    all arrived waits until `min_partial_chunk` tokens can be computed: a step reads all the weights for however few.
 4. Waiting sequences are admitted oldest first while there are seats, budget, and pages for all known tokens plus one.
    The first that does not fit stops admission: nobody overtakes. Two exceptions for media whose rows have not all
    arrived: those that have every input go first, and a running sequence that can only wait for rows gives way to
    them, so a slow stream slows nobody else. Rows come whether or not their sequence runs, so it cannot starve.
Progress: the oldest running sequence that can compute is never preempted for another, and one sequence always fits the
pool (`max_len` is capped by it), so it runs to its end. An admitted sequence has the page its next token needs, so no
two sequences can trade places without one of them gaining a token.
"""

from bisect import insort
from collections.abc import Iterable

from language_worker.decode.base import DecodeStrategy
from language_worker.errors import InvalidRequest
from language_worker.page_pool import PagePool
from language_worker.plan import StepPlan, Window
from language_worker.request import Event, Sequence, Status


def _age(seq: Sequence) -> tuple[int, int]:
    return seq.key


class Scheduler:
    """See the module's rules. `pool` is exclusively this scheduler's."""

    def __init__(
        self,
        *,
        pool: PagePool,
        strategy: DecodeStrategy,
        page_size: int,
        max_num_seqs: int,
        max_step_tokens: int,
        max_prefill_chunk: int = 0,
        min_partial_chunk: int = 1,
    ) -> None:
        self.pool = pool
        self.strategy = strategy
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.max_prefill_chunk = min(max_prefill_chunk or max_step_tokens, max_step_tokens)
        self.min_partial_chunk = min_partial_chunk
        self.waiting: list[Sequence] = []  # both lists stay sorted by age
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; InvalidRequest when even an empty pool could not hold its longest form."""
        if self._pages_for(seq.max_len) > self.pool.num_pages:
            raise InvalidRequest(
                f"a sequence of {seq.max_len} tokens needs {self._pages_for(seq.max_len)} pages and the cache has "
                f"{self.pool.num_pages}; lower max_model_len or raise kv_cache_tokens"
            )
        insort(self.waiting, seq, key=_age)

    def end(self, seq: Sequence) -> None:
        """Finish a sequence in whatever state it is and take back its pages; ending it twice changes nothing."""
        if seq.status is Status.FINISHED:
            return
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        self.pool.release(seq.key)
        seq.apply(Event.ENDED)

    def plan(self) -> StepPlan:
        """Choose the next step's windows; preempts and admits as a side effect. Empty when nothing can run now."""
        preempted: list[Sequence] = []
        windows = self._plan_decodes(preempted)
        budget = self.max_step_tokens - len(windows)
        budget = self._plan_prefills([s for s in self.running if s.missing > 1], windows, budget)
        if not preempted:
            self._admit(windows, budget, preempted)
        return StepPlan(windows=tuple(windows), preempted=tuple(preempted))

    def commit(self, window: Window, tokens: Iterable[int] = ()) -> None:
        """The window's step ran: advance its sequence, unless it ended meanwhile."""
        if window.seq.status is Status.RUNNING:
            self.strategy.advance(window, list(tokens))

    def _plan_decodes(self, preempted: list[Sequence]) -> list[Window]:
        windows: list[Window] = []
        for seq in [s for s in self.running if s.missing == 1]:
            if seq.status is not Status.RUNNING or not self._cover(seq, preempted):
                continue
            window = self.strategy.window(seq, 1)
            if window is not None:
                windows.append(window)
        return windows

    def _plan_prefills(self, seqs: list[Sequence], windows: list[Window], budget: int) -> int:
        for seq in seqs:
            if budget <= 0:
                break
            window = self._chunk(seq, budget)
            if window is not None:
                windows.append(window)
                budget -= window.length
        return budget

    def _chunk(self, seq: Sequence, budget: int) -> Window | None:
        """A prefill window worth a step, whose end is aligned, unless it reaches the last known token."""
        limit = min(budget, self.max_prefill_chunk)
        window = self.strategy.window(seq, limit)
        if window is not None and not seq.is_ready and window.length < min(self.min_partial_chunk, limit):
            return None
        excess = 0 if window is None else window.end % self.strategy.alignment
        if window is None or excess == 0 or window.end == len(seq.tokens):
            return window
        return self.strategy.window(seq, window.length - excess) if window.length > excess else None

    def _admit(self, windows: list[Window], budget: int, preempted: list[Sequence]) -> None:
        stalled = self._stalled() if self.waiting else []
        while self.waiting and budget > 0:
            seq = next((s for s in self.waiting if s.is_ready), self.waiting[0])
            needed = self._pages_for(min(len(seq.tokens) + 1 + self.strategy.lookahead, seq.max_len))
            while needed > self.pool.num_free or len(self.running) >= self.max_num_seqs:
                if not stalled or not seq.is_ready:
                    return
                preempted.append(stalled[-1])
                self._preempt(stalled.pop())
            self.waiting.remove(seq)
            seq.pages = self.pool.allocate(needed, seq.key)
            seq.apply(Event.ADMITTED)
            insort(self.running, seq, key=_age)
            budget = self._plan_prefills([seq], windows, budget)

    def _cover(self, seq: Sequence, preempted: list[Sequence]) -> bool:
        """Give `seq` the pages its next window writes to, preempting by rule 2; False if it gave way itself."""
        needed = self._pages_for(len(seq.tokens) + self.strategy.lookahead) - len(seq.pages)
        stalled = self._stalled() if needed > self.pool.num_free else []
        while needed > self.pool.num_free:
            victim = stalled.pop() if stalled else self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is seq:
                return False
        if needed > 0:
            seq.pages += self.pool.allocate(needed, seq.key)
        return True

    def _stalled(self) -> list[Sequence]:
        """Running sequences that can compute nothing until more of their media rows arrive, oldest first."""
        return [s for s in self.running if not s.is_ready and self._chunk(s, self.max_prefill_chunk) is None]

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pool.release(seq.key)
        seq.apply(Event.PREEMPTED)
        insort(self.waiting, seq, key=_age)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def check_invariants(self) -> None:
        """Assert the lists, statuses and pages agree (tests; our own bugs only)."""
        self.pool.check_invariants()
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert [s.key for s in queue] == sorted(s.key for s in queue), "queue out of order"
            assert all(s.status is status for s in queue), "status differs from queue"
        assert len(self.running) <= self.max_num_seqs, "too many running"
        assert all(not s.pages and s.kv_len == 0 for s in self.waiting), "a waiting sequence holds something"
        for seq in self.running:
            assert list(self.pool.held_by(seq.key)) == seq.pages, "pages differ from the ledger"
            assert 0 <= seq.kv_len <= len(seq.tokens) <= seq.max_len, "lengths out of order"
            assert seq.kv_len <= len(seq.pages) * self.page_size, "KV beyond the pages"
        assert self.pool.num_in_use == sum(len(s.pages) for s in self.running), "pages leaked"
