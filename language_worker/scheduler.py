"""Scheduler: which query positions run in the next step, and whose pages pay for them.

Pure: sequences in, a StepPlan out; no tensors, clock or threads. Owns the waiting and running lists and the page pool.

Rules, in order
 1. Age decides. A request's age is fixed at submission, where its priority makes it older or younger by so many
    seconds, and survives preemption. A younger one overtakes nobody for ever.
 2. Every running sequence that misses one token gets it (decodes), oldest first; when a page is lacking, the youngest
    of those that can only wait for media rows is preempted, else the youngest of all: it loses its KV (`kv_len = 0`),
    or leaves it in host memory where there is room (`SwapSpace`), and waits again under its old age.
 3. What is left of `max_step_tokens` goes to running prefills, oldest first, in chunks. One whose media rows have not
    all arrived waits until `min_partial_chunk` tokens can be computed: a step reads all the weights for however few.
    One whose logits are all asked for computes `max_prompt_logits` positions a step at most, together with its like.
    One that cannot end in this step leaves a quarter of what is left to those behind it, so that a short prompt does
    not stand behind a long one; what they do not take goes back to it.
 4. Waiting sequences are admitted oldest first while there are seats, budget, and pages for all known tokens plus one.
    The first that does not fit stops admission: nobody overtakes. Two exceptions for media whose rows have not all
    arrived: those that have every input go first, and a running sequence that can only wait for rows gives way to
    them, so a slow stream slows nobody else. Rows come whether or not their sequence runs, so it cannot starve.
    To what a prefill leaves by rule 3, the oldest that fits into a step is admitted, and beside that one those that
    end within what is left: more at once would hold their pages for long, and begin before a prefix is there that they
    could share. Who is passed over for that lets so many positions past (`OVERTAKING_STEPS`), and then no younger one.
 5. A request's samples share its prompt: the first computes it, the others are forked off it then, or wait while one of
    them computes it again.
Progress: the oldest running sequence that can compute is never preempted for another, and one sequence always fits the
pool (`max_len` is capped by it), so it runs to its end. An admitted sequence has the page its next token needs, so no
two sequences can trade places without one of them gaining a token.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from language_worker.decode.base import DecodeStrategy
from language_worker.errors import InvalidRequest
from language_worker.page_keeper import PageKeeper
from language_worker.page_pool import PagePool
from language_worker.plan import StepPlan, Window
from language_worker.prefix_cache import PrefixCache
from language_worker.request import Event, Sequence, Status
from language_worker.state_slots import StateSlots
from language_worker.swap_space import SwapSpace

OVERTAKING_STEPS = 4  # whose positions may go to younger prompts before one that does not fit into a step
KEPT_PART = 4  # of a step's budget, one of so many parts is not for a prefill that needs more than all of it


def _age(seq: Sequence) -> tuple[float, int, int]:
    return seq.rank


def _gives_prompt_logits(seq: Sequence) -> bool:
    """The logits of every position of its next window are asked for."""
    return seq.wants_prompt_logits and seq.kv_len < seq.prompt_len


class Scheduler:
    """See the module's rules. `pool` is exclusively this scheduler's; `prefix_cache`, if any, is over that pool.
    has_state: sequences keep recurrent state beside their pages, each at a slot below `max_num_seqs`."""

    def __init__(
        self,
        *,
        pool: PagePool,
        strategy: DecodeStrategy,
        page_size: int,
        max_num_seqs: int,
        max_step_tokens: int,
        max_prefill_chunk: int = 0,
        max_prompt_logits: int = 0,
        prefix_cache: PrefixCache | None = None,
        min_partial_chunk: int = 1,
        kv_window: int = 0,
        swap: SwapSpace | None = None,
        has_state: bool = False,
    ) -> None:
        """kv_window: how many of its last keys a query sees in whichever layer; older pages are given back (0: all).
        swap: where preempted sequences leave their KV (None: nowhere). max_prompt_logits: positions of prompts whose
        logits are all asked for, in one step (0: as many as it has)."""
        self.pool = pool
        slots = StateSlots(max_num_seqs) if has_state else None
        self.pages = PageKeeper(pool, page_size, prefix_cache, window=kv_window, swap=swap, states=slots)
        self.strategy = strategy
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.max_prefill_chunk = min(max_prefill_chunk or max_step_tokens, max_step_tokens)
        self.max_prompt_logits = max(max_prompt_logits or max_step_tokens, strategy.alignment)
        self.min_partial_chunk = min_partial_chunk
        self.waiting: list[Sequence] = []  # both lists stay sorted by age
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; InvalidRequest when even an empty pool could not hold its longest form."""
        needed = self.pages.pages_for(self._most_positions(seq))
        if needed > self.pool.num_pages:
            raise InvalidRequest(
                f"a sequence of {seq.max_len} tokens needs {needed} pages and the cache has "
                f"{self.pool.num_pages}; lower max_model_len or raise kv_cache_tokens"
            )
        if seq.canvas is not None and seq.max_len * seq.canvas.num_copies > self.max_step_tokens:
            twice = " twice (cfg_scale)" if seq.canvas.num_copies > 1 else ""
            raise InvalidRequest(
                f"a canvas of {seq.max_len} tokens is computed whole{twice} and a step holds {self.max_step_tokens}; "
                "lower max_tokens or raise max_step_tokens"
            )
        seq.apply(Event.QUEUED)
        insort(self.waiting, seq, key=_age)

    def fork(self, child: Sequence) -> None:
        """Queue another sample of a running sequence's prompt; it begins at once if there is a seat and room for it."""
        self.add(child)
        if self._next_waiting() is child:
            self._try_start(child)

    def end(self, seq: Sequence) -> None:
        """Finish a sequence in whatever state it is and take back its pages; ending it twice changes nothing."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is not Status.NEW:
            (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        self.pages.release(seq)
        seq.apply(Event.ENDED)

    def plan(self) -> StepPlan:
        """Choose the next step's windows; preempts and admits as a side effect. Empty when nothing can run now."""
        forks = self.pages.take_copies()  # of forks since the last plan, whose sources may be given away by this one
        for seq in self.running:
            self.pages.trim(seq)
        preempted: list[Sequence] = []
        windows = self._plan_decodes(preempted)
        num_decodes = len(windows)
        budget = self.max_step_tokens - sum(window.length for window in windows)
        budget = self._plan_prefills([s for s in self.running if not self._is_decode(s)], windows, budget)
        if not preempted:
            budget = self._admit(windows, num_decodes, budget, preempted)
        self._give_back(windows, num_decodes, budget)
        return StepPlan(
            windows=tuple(windows),
            preempted=tuple(preempted),
            forks=forks,
            copies=self.pages.take_copies(),
            imports=self.pages.take_imports(),
            swaps=self.pages.take_swaps(),
            starts=() if self.pages.states is None else self.pages.states.take_starts(),
        )

    def commit(self, window: Window, tokens: Iterable[int] = ()) -> None:
        """The window's step ran: advance its sequence, unless it ended meanwhile."""
        if window.seq.status is Status.RUNNING:
            old_len = window.seq.kv_len
            self.strategy.advance(window, list(tokens))
            self.pages.seal(window.seq, old_len)

    def _plan_decodes(self, preempted: list[Sequence]) -> list[Window]:
        covered: list[Sequence] = []
        for seq in [s for s in self.running if self._is_decode(s)]:
            if seq.status is Status.RUNNING and self._cover(seq, preempted):
                covered.append(seq)
        covered = [seq for seq in covered if seq.status is Status.RUNNING]  # a later one may have taken its pages
        windows, spare = [], self._spare_for_drafts(len(covered))
        for seq in covered:
            window = self.strategy.window(seq, 1, self._room_for_drafts(seq, spare))
            if window is not None:
                windows.append(window)
                spare -= len(window.drafts)
        return windows

    def _spare_for_drafts(self, num_decodes: int) -> int:
        """Query tokens of this step that drafts may take; half of what is left where prefills want them too."""
        if not self.strategy.max_drafts:
            return 0
        spare = self.max_step_tokens - num_decodes
        return spare // 2 if self.waiting or any(s.missing > 1 for s in self.running) else spare

    def _room_for_drafts(self, seq: Sequence, spare: int) -> int:
        """Drafts that `seq` may try; pages for them are taken if free, and from nobody."""
        wanted = min(self.strategy.max_drafts, spare, seq.max_len - len(seq.tokens) - 1)
        if wanted <= 0:
            return 0
        lacking = self.pages.num_lacking(seq, len(seq.tokens) + wanted)
        if lacking > 0 and lacking <= self.pool.num_free:
            self.pages.grow(seq, lacking)
        return min(wanted, self.pages.num_spare(seq))

    def _plan_prefills(self, seqs: list[Sequence], windows: list[Window], budget: int) -> int:
        for seq in seqs:
            if budget <= 0:
                break
            limit = min(budget, self._room_for_logits(seq, windows))
            window = self._chunk(seq, min(limit, self._share(seq, budget))) or self._chunk(seq, limit)
            if window is not None:
                windows.append(window)
                budget -= window.num_tokens
        return budget

    def _share(self, seq: Sequence, budget: int) -> int:
        """What a prefill may take of `budget` while others may want it."""
        if self.strategy.is_whole or seq.missing <= budget:
            return budget
        return budget - budget // KEPT_PART

    def _give_back(self, windows: list[Window], num_decodes: int, budget: int) -> None:
        """What nobody took of the budget goes to the prefills that left it, oldest first."""
        for i in range(num_decodes, len(windows)):
            longer = self._longer(windows, i, budget)
            if longer is not None:
                budget -= longer.length - windows[i].length
                windows[i] = longer

    def _longer(self, windows: list[Window], i: int, budget: int) -> Window | None:
        """Window i with what it would take of `budget`, None if that is nothing."""
        window = windows[i]
        if budget <= 0 or self.strategy.is_whole or window.end >= len(window.seq.tokens):
            return None
        room = self._room_for_logits(window.seq, windows[:i] + windows[i + 1 :])
        longer = self._chunk(window.seq, min(window.length + budget, room))
        return longer if longer is not None and longer.length > window.length else None

    def _room_for_logits(self, seq: Sequence, windows: list[Window]) -> int:
        """Positions that `seq` may compute beside `windows` for the sake of the logits that it wants of them."""
        if not _gives_prompt_logits(seq) or seq.canvas is not None:
            return self.max_step_tokens
        asked = sum(window.length for window in windows if _gives_prompt_logits(window.seq))
        return self.max_prompt_logits - asked

    def _is_decode(self, seq: Sequence) -> bool:
        return seq.missing == 1 and not self.strategy.is_whole

    def _most_positions(self, seq: Sequence) -> int:
        """Positions for which its longest form needs pages; a copy begins on a page of its own."""
        if seq.canvas is None:
            return seq.max_len
        return self.pages.pages_for(seq.max_len) * self.page_size * seq.canvas.num_copies

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

    def _admit(self, windows: list[Window], num_decodes: int, budget: int, preempted: list[Sequence]) -> int:
        planned = {window.seq.key for window in windows}
        stalled = [s for s in self._stalled() if s.key not in planned] if self.waiting else []
        while budget > 0 and self.waiting:
            num_left = sum(self._longer(windows, i, budget) is not None for i in range(num_decodes, len(windows)))
            seq = self._next_waiting((None, self.max_step_tokens)[num_left] if num_left < 2 else budget)
            if seq is None:
                break
            while not self._try_start(seq):
                if not stalled or not seq.is_ready:
                    return budget
                preempted.append(stalled[-1])
                self._preempt(stalled.pop())
            for older in self.waiting[: bisect_left(self.waiting, _age(seq), key=_age)]:
                older.num_overtaken += seq.missing if older.is_ready else 0
            budget = self._plan_prefills([seq], windows, budget)
        return budget

    def _next_waiting(self, most: int | None = None) -> Sequence | None:
        """Whose turn it is by rules 4 and 5; most: positions in which it must end."""
        oldest = None
        for seq in self.waiting:
            if seq.has_siblings and any(s.kv_len < s.prompt_len for s in self._siblings(seq)):
                continue
            if most is not None and seq.imported is None and seq.missing > most:
                if seq.is_ready and seq.num_overtaken >= OVERTAKING_STEPS * self.max_step_tokens:
                    return None
                continue
            if seq.is_ready:
                return seq
            oldest = oldest or seq
        return oldest if most is None else None

    def _siblings(self, seq: Sequence) -> list[Sequence]:
        """Running samples of the same prompt."""
        return [s for s in self.running if s.key[0] == seq.key[0]] if seq.has_siblings else []

    def _try_start(self, seq: Sequence) -> bool:
        """Admit a waiting sequence if there is a seat, and pages for its tokens and the next one."""
        prefix = self.pages.find_prefix(seq, self._siblings(seq))
        num_tokens = min(len(seq.tokens) + 1 + self.strategy.lookahead, self._most_positions(seq))
        if len(self.running) >= self.max_num_seqs or not self.pages.can_start(prefix, num_tokens):
            return False
        self.waiting.remove(seq)
        seq.apply(Event.ADMITTED)
        self.pages.start(seq, prefix, num_tokens)
        insort(self.running, seq, key=_age)
        return True

    def _cover(self, seq: Sequence, preempted: list[Sequence]) -> bool:
        """Give `seq` the pages its next window writes to, preempting by rule 2; False if it gave way itself."""
        needed = self.pages.num_lacking(seq, len(seq.tokens) + self.strategy.lookahead)
        stalled = self._stalled() if needed > self.pool.num_free else []
        while needed > self.pool.num_free:
            victim = stalled.pop() if stalled else self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is seq:
                return False
        if needed > 0:
            self.pages.grow(seq, needed)
        return True

    def _stalled(self) -> list[Sequence]:
        """Running sequences that can compute nothing until more of their media rows arrive, oldest first."""
        return [s for s in self.running if not s.is_ready and self._chunk(s, self.max_prefill_chunk) is None]

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pages.put_aside(seq)
        seq.apply(Event.PREEMPTED)
        insort(self.waiting, seq, key=_age)

    def check_invariants(self) -> None:
        """Assert the lists, statuses and pages agree (tests; our own bugs only)."""
        self.pool.check_invariants()
        if self.pages.cache is not None:
            self.pages.cache.check_invariants()
        if self.pages.swap is not None:
            self.pages.swap.check_invariants([s.key for s in self.waiting])
        if self.pages.states is not None:
            self.pages.states.check_invariants(self.running, self.max_num_seqs)
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert [s.rank for s in queue] == sorted(s.rank for s in queue), "queue out of order"
            assert all(s.status is status for s in queue), "status differs from queue"
        assert len(self.running) <= self.max_num_seqs, "too many running"
        assert all(not s.pages and s.kv_len == 0 for s in self.waiting), "a waiting sequence holds something"
        for seq in self.running:
            assert list(self.pool.held_by(seq.key)) == seq.pages, "pages differ from the ledger"
            assert 0 <= seq.kv_len <= len(seq.tokens) <= seq.max_len, "lengths out of order"
            assert seq.kv_len <= (seq.first_page + len(seq.pages)) * self.page_size, "KV beyond the pages"
            assert seq.first_page <= self.pages.first_seen_page(seq.kv_len), "a page is lacking that is still seen"
            num_sealed = seq.kv_len // self.page_size - seq.first_page
            assert all(self.pool.num_holders(page) == 1 for page in seq.pages[num_sealed:]), "a page to write is shared"
        assert self.pool.num_in_use == len({page for s in self.running for page in s.pages}), "pages leaked"
