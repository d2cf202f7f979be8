"""What the scheduler and the runner share: a window of query positions per sequence, and the plan of one step.

Values only; no behaviour, no tensors.

    tokens   0 ........ kv_len ........ start+length ........ len(tokens)
                        └── window: queries of this step ──┘
    the first `num_final` positions of the window leave final KV behind; the rest is provisional
"""

from dataclasses import dataclass

from language_worker.canvas import Fill
from language_worker.request import ImportedKV, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class KVImport:
    """Positions [start, end) of a sequence: their KV is to be copied from what was imported into its pages."""

    seq: Sequence
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StateStart:
    """What the recurrent state at `slot` begins with: what is at slot `source`, or what was imported, or zeros."""

    slot: int
    source: int | None = None
    imported: ImportedKV | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapMoves:
    """Pages to copy between the cache and host memory: outs (cache, host) first, then ins (host, cache)."""

    outs: tuple[tuple[int, int], ...] = ()
    ins: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Query positions [start, start + length) of one sequence.

    num_final: how many leading positions are known to leave final KV. samples: the logits of the last known token
    choose the next one. drafts: guesses at the tokens behind the known ones, on the last positions of the window; each
    that is right makes its logits choose another. num_copies: versions of the sequence that are computed side by side.
    fills: what a canvas' window has chosen, once it ran.
    """

    seq: Sequence
    start: int
    length: int
    num_final: int
    samples: bool
    drafts: tuple[int, ...] = ()
    num_copies: int = 1
    fills: tuple[Fill, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Query positions of all copies."""
        return self.length * self.num_copies

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Windows of one step (decodes first, then prefill chunks) and who was preempted to make it possible.

    forks, copies: (source, target) pages whose content must be copied, all sources read before any target is written,
    before the windows run; each target occurs once. forks come before all else, since their sources may belong to
    others by now. swaps: pages that leave for host memory or come back from it, after that. imports: what must be in
    the pages then. copies come last. starts: of recurrent states, under the rules of `copies`. wants_logits: those that
    its windows ask for; none otherwise.
    """

    windows: tuple[Window, ...]
    preempted: tuple[Sequence, ...] = ()
    forks: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    imports: tuple[KVImport, ...] = ()
    swaps: SwapMoves = SwapMoves()
    starts: tuple[StateStart, ...] = ()
    wants_logits: bool = True

    @property
    def num_tokens(self) -> int:
        return sum(window.num_tokens for window in self.windows)
