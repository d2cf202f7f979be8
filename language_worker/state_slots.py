"""StateSlots: which running sequence keeps its recurrent state at which slot, and what the state there begins with.

One slot for each seat, so a sequence that is admitted has one. States begin with zeros, with a copy of a sibling's that
stands at the same position, or with what another engine computed; what is due is handed to the runner with the next
plan, before its windows. A slot that was given back keeps its content until then, so its last owner's forks still begin
with it. Pure: slots and sequences, no tensors.
"""

import heapq
from collections.abc import Iterable
from dataclasses import replace

from language_worker.plan import StateStart
from language_worker.request import ImportedKV, Sequence


class StateSlots:
    """`num_slots` slots, the lowest free ones go first."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))  # a heap
        self._starts: dict[int, StateStart] = {}  # by slot, until they are taken

    def start(self, seq: Sequence, *, donor: Sequence | None = None, imported: ImportedKV | None = None) -> None:
        """Give `seq` a slot. donor: whose state it begins with; imported: what it begins with otherwise."""
        slot = heapq.heappop(self._free)
        if donor is None:
            start = StateStart(slot=slot, imported=imported)
        else:  # the donor's own may not have begun yet
            start = replace(
                self._starts.get(donor.state_slot, StateStart(slot=slot, source=donor.state_slot)), slot=slot
            )
        self._starts[slot] = start
        seq.state_slot = slot

    def release(self, seq: Sequence) -> None:
        """Take back the slot of `seq`, if it has one."""
        if seq.state_slot >= 0:
            self._starts.pop(seq.state_slot, None)
            heapq.heappush(self._free, seq.state_slot)
            seq.state_slot = -1

    def take_starts(self) -> tuple[StateStart, ...]:
        """What became due since the last call."""
        starts, self._starts = tuple(self._starts.values()), {}
        return starts

    def check_invariants(self, running: Iterable[Sequence], num_slots: int) -> None:
        """Assert that every running sequence has a slot and nobody else (tests; our own bugs only)."""
        held = [seq.state_slot for seq in running]
        assert sorted([*held, *self._free]) == list(range(num_slots)), "slots of states leaked, or are shared"
