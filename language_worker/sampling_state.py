"""SamplingState: what one sample's next choice depends on besides the logits.

Owns the parameters, the counter-based random numbers and the token counts that penalties need. The draw for sample i
at output position p is a keyed hash of (seed, i, p): it knows nothing of batches, steps or preemptions.
"""

import struct
from collections.abc import Sequence
from copy import copy
from hashlib import blake2b

from language_worker.logit_rules import LogitRules
from language_worker.sampling_params import SamplingParams
from language_worker.tools.machine import Toolbox, ToolMachine

_SCALE = 2.0**-53


def uniform_draw(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone; 53 random bits."""
    key = struct.pack("<QQ", index, position)
    digest = blake2b(key, digest_size=8, key=struct.pack("<Q", seed & 0xFFFF_FFFF_FFFF_FFFF), person=b"tandem-draw")
    return (int.from_bytes(digest.digest(), "little") >> 11) * _SCALE


class SamplingState:
    """State of one sample. `stop_ids`: EOS and stop token ids, which min_tokens keeps from being chosen.

    rules: what happens to its logits first (None: nothing). counts: how often its output holds each id, if rules ask.
    num_top: alternatives to report beside each token's log-probability; None: no report is needed. machine: what writes
    into its output (None: nothing does).
    """

    __slots__ = (
        "counts", "index", "is_plain_greedy", "machine", "num_generated", "num_top", "params", "rules", "seed",
    )  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        *,
        index: int,
        seed: int,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        toolbox: Toolbox | None = None,
    ) -> None:
        self.params = params
        self.index = index
        self.seed = seed
        self.num_generated = 0
        self.counts: dict[int, int] = {}
        needs_rules = LogitRules.are_needed(params, stop_ids)
        self.rules = LogitRules(params, prompt=prompt, stop_ids=stop_ids) if needs_rules else None
        self.num_top = 0 if params.logprobs is None and params.num_samples > params.n else params.logprobs
        self.machine = None if toolbox is None else ToolMachine(toolbox)
        has_rules = self.rules is not None or self.machine is not None
        self.is_plain_greedy = params.is_greedy and self.num_top is None and not has_rules

    @property
    def forced_id(self) -> int | None:
        """The token that the next output position has, whatever the logits say; None: one is chosen."""
        return self.machine.forced[0] if self.machine is not None and self.machine.forced else None

    def draw(self) -> float:
        """The random number of the next output position."""
        return uniform_draw(self.seed, self.index, self.num_generated)

    def after(self, token_ids: Sequence[int]) -> "SamplingState":
        """The state that it will be in once these are observed; itself when there are none."""
        if not token_ids:
            return self
        later = copy(self)
        later.counts = dict(self.counts)
        later.machine = None if self.machine is None else self.machine.copy()
        for token_id in token_ids:
            later.observe(token_id)
        return later

    def observe(self, token_id: int) -> None:
        """Record a chosen token."""
        self.num_generated += 1
        if self.rules is not None:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1
        if self.machine is not None:
            self.machine.observe(token_id)
