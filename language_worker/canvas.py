"""Canvas: the text of one sample while its masks are replaced, block by block.

Owns which positions are open, which step of which block comes next, and what of the cached keys and values is still
good enough to be used. All values, no tensors; a failed step changes nothing here.

    prompt | done | done | open block | masks      canvas `full`: all of it is seen
                         start        end          canvas `block`: nothing behind the open block exists yet
    KV policy `prefix` computes from start on, `dual` from start to end; the rest is what the last refresh left

Once the open block has no masks, its tokens leave and the next begins. A block may end before: nothing behind a token
that ends the output is ever seen, so it is done when everything up to the first such token is filled.

Where one engine computes prompts and another fills in masks, the first computes the canvas as it is at its beginning
and hands over what that leaves of the prompt (`PromptKV`). The second computes all but the prompt in its first step,
and then is where it would be if it had computed everything.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from language_worker.api import TokenLogprob
from language_worker.diffusion_params import DiffusionParams
from language_worker.errors import InvalidRequest

DEFAULT_BLOCK_LENGTH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """A token for one position of the canvas, and how likely it was if that was asked for."""

    position: int
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """How a canvas of `length` masks is cut: `block_length` positions each (the last may be shorter), and the steps
    that the static schedule spends on each block."""

    length: int
    block_length: int
    steps: tuple[int, ...]

    @classmethod
    def of(cls, params: DiffusionParams, length: int) -> "BlockPlan":
        """InvalidRequest when blocks or steps do not fit the length."""
        block_length = params.block_length or min(DEFAULT_BLOCK_LENGTH, length)
        if block_length > length:
            raise InvalidRequest(
                f"diffusion.block_length is {block_length} and the answer has {length} tokens (max_tokens); "
                "use at most as many"
            )
        num_blocks = -(-length // block_length)
        steps = length if params.steps is None else params.steps
        if steps < num_blocks:
            raise InvalidRequest(
                f"diffusion.steps is {steps} for {num_blocks} blocks of {block_length}; every block needs a step"
            )
        if params.steps is None:
            return cls(
                length=length,
                block_length=block_length,
                steps=tuple(min(block_length, length - i * block_length) for i in range(num_blocks)),
            )
        each, rest = divmod(steps, num_blocks)
        return cls(length=length, block_length=block_length, steps=tuple(each + (i < rest) for i in range(num_blocks)))


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptKV:
    """What goes from the engine that computes a canvas' prompt to the one that fills it in: `num_rows` of keys and
    values, computed in sight of `num_masks` behind the prompt. The policy `none` uses nothing again: nothing goes."""

    num_rows: int = 0
    num_masks: int = 0

    @classmethod
    def of(cls, params: DiffusionParams, prompt_len: int, length: int) -> "PromptKV":
        """For a canvas of `length` masks. Raises as `BlockPlan.of` does."""
        plan = BlockPlan.of(params, length)
        if params.kv_policy == "none":
            return cls()
        num_masks = length if params.canvas == "full" else plan.block_length
        return cls(num_rows=prompt_len * params.num_copies, num_masks=num_masks)


class Canvas:
    """prompt: its token ids. length: masks behind it. stop_ids: tokens that end the output once `min_tokens` are there.
    is_exported: its prompt's KV is for another engine, and nothing is filled in here. has_prompt_kv: it came from one.

    block, start, end: which block is open and where it lies. step: steps that it has had. num_forwards, num_forwarded:
    forwards so far and the query positions in them.
    """

    __slots__ = (
        "_fills", "_is_fresh", "_min_tokens", "_plan", "_stop_ids", "block", "end", "is_exported", "mask_id",
        "needs_prompt_pass", "num_forwarded", "num_forwards", "params", "prompt_kv", "prompt_len", "start", "step",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        prompt: Sequence[int],
        length: int,
        params: DiffusionParams,
        *,
        mask_id: int,
        stop_ids: Collection[int] = (),
        min_tokens: int = 0,
        needs_prompt_pass: bool = False,
        is_exported: bool = False,
        has_prompt_kv: bool = False,
    ) -> None:
        self.params = params
        self.mask_id = mask_id
        self.prompt_len = len(prompt)
        self.tokens = [*prompt, *[mask_id] * length]
        self.needs_prompt_pass = needs_prompt_pass
        self.prompt_kv = PromptKV.of(params, len(prompt), length)
        self.is_exported = is_exported
        self._is_fresh = has_prompt_kv  # the prompt's KV is that of the canvas as it stands
        self.num_forwards = self.num_forwarded = 0
        self._plan = BlockPlan.of(params, length)
        self._stop_ids = frozenset(stop_ids)
        self._min_tokens = min_tokens
        self._open(0)

    @property
    def num_copies(self) -> int:
        return self.params.num_copies

    @property
    def fills_next(self) -> bool:
        """Whether the next step replaces masks."""
        return not self.needs_prompt_pass and not self.is_exported

    @property
    def can_hand_over(self) -> bool:
        """Everything that another engine needs of it is computed."""
        return self.is_exported and not self.needs_prompt_pass and (self._is_fresh or not self.prompt_kv.num_rows)

    @property
    def visible_end(self) -> int:
        """Positions from there on are not seen by any other."""
        if self.needs_prompt_pass:
            return self.prompt_len
        return len(self.tokens) if self.params.canvas == "full" else self.end

    @property
    def is_refresh(self) -> bool:
        """Whether the next step computes everything that is seen."""
        interval = self.params.refresh_interval
        return self.params.kv_policy == "none" or self.step == 0 or (interval > 0 and self.step % interval == 0)

    def query_range(self) -> tuple[int, int]:
        """Positions that the next step computes."""
        if self.needs_prompt_pass or (self.is_refresh and not self._is_fresh):
            return 0, self.visible_end
        if self.is_refresh or self.params.kv_policy == "prefix":
            return self.start, self.visible_end
        reach = self.params.vicinity
        return max(0, self.start - reach), min(self.visible_end, self.end + reach)

    def open_positions(self) -> list[int]:
        """Masks of the open block, ascending."""
        return [position for position in range(self.start, self.end) if position not in self._fills]

    def quota(self) -> int:
        """Masks that the static schedule replaces in the next step."""
        each, rest = divmod(self.end - self.start, self._plan.steps[self.block])
        return each + (self.step < rest)

    def released_by(self, fills: Sequence[Fill]) -> tuple[Fill, ...]:
        """What leaves once `fills` are made: the whole block if that completes it, else nothing."""
        filled = self._fills | {fill.position: fill for fill in fills}
        end = self.end
        for position in range(self.start, self.end):
            fill = filled.get(position)
            if fill is None:
                return ()
            if fill.token_id in self._stop_ids and position - self.prompt_len + 1 >= self._min_tokens:
                end = position + 1
                break
        return tuple(filled[position] for position in range(self.start, end))

    def advance(self, fills: Sequence[Fill], num_forwarded: int) -> None:
        """A forward over `num_forwarded` positions ran and chose `fills`."""
        self.num_forwards += 1
        self.num_forwarded += num_forwarded
        if self.needs_prompt_pass:
            self.needs_prompt_pass = False
            return
        self._is_fresh = self.is_exported
        if self.is_exported:
            return
        self.step += 1
        for fill in fills:
            self.tokens[fill.position] = fill.token_id
            self._fills[fill.position] = fill
        if len(self._fills) == self.end - self.start and self.end < len(self.tokens):
            self._open(self.block + 1)

    def preview(self, fills: Sequence[Fill]) -> tuple[int | None, ...]:
        """The open block as it will stand after `fills`; None where there is a mask."""
        filled = self._fills | {fill.position: fill for fill in fills}
        return tuple(
            filled[position].token_id if position in filled else None for position in range(self.start, self.end)
        )

    def _open(self, block: int) -> None:
        self.block = block
        self.start = self.prompt_len + block * self._plan.block_length
        self.end = min(len(self.tokens), self.start + self._plan.block_length)
        self.step = 0
        self._fills: dict[int, Fill] = {}
