"""SamplingState: what one sample's next choice depends on besides the logits.

Owns the parameters, the counter-based random numbers and the token counts that penalties need. The draw for sample i
at output position p is a keyed hash of (seed, i, p): it knows nothing of batches, steps or preemptions.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

from language_worker.api import SamplingParams

_SCALE = 2.0**-53


def uniform_draw(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone; 53 random bits."""
    key = struct.pack("<QQ", index, position)
    digest = blake2b(key, digest_size=8, key=struct.pack("<Q", seed & 0xFFFF_FFFF_FFFF_FFFF), person=b"tandem-draw")
    return (int.from_bytes(digest.digest(), "little") >> 11) * _SCALE


class SamplingState:
    """State of one sample. `stop_ids`: ids that min_tokens keeps from being chosen (EOS and stop token ids).

    num_top: alternatives to report beside each token's log-probability; None: no report is needed.
    """

    __slots__ = (
        "counts", "index", "is_plain_greedy", "num_generated", "num_top", "params", "prompt_ids", "seed", "stop_ids",
    )  # fmt: skip

    def __init__(
        self, params: SamplingParams, *, index: int, seed: int, prompt: Sequence[int], stop_ids: Sequence[int]
    ) -> None:
        self.params = params
        self.index = index
        self.seed = seed
        self.stop_ids = tuple(stop_ids) if params.min_tokens else ()
        self.num_generated = 0
        self.counts: dict[int, int] = {}
        self.prompt_ids = sorted(set(prompt)) if params.repetition_penalty != 1.0 else []
        self.num_top = 0 if params.logprobs is None and params.num_samples > params.n else params.logprobs
        self.is_plain_greedy = params.is_greedy and self.num_top is None and not self.adjusts_logits

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return bool(params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1.0

    @property
    def adjusts_logits(self) -> bool:
        return self.has_penalties or bool(self.params.logit_bias) or bool(self.stop_ids)

    @property
    def suppresses_stop(self) -> bool:
        """The output is still shorter than min_tokens."""
        return self.num_generated < self.params.min_tokens

    def draw(self) -> float:
        """The random number of the next output position."""
        return uniform_draw(self.seed, self.index, self.num_generated)

    def observe(self, token_id: int) -> None:
        """Record a chosen token."""
        self.num_generated += 1
        if self.has_penalties:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1
