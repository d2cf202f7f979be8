"""BlockPool against a model: a dict of who holds what."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from transfer import Allocation, BlockPool, DoubleFree, ForeignOwner, PoolExhausted

NUM_BLOCKS, BLOCK_SIZE = 7, 16


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.live: list[Allocation] = []
        self.dead: list[Allocation] = []
        self.generations: set[int] = set()

    def holders(self) -> dict[int, Allocation]:
        return {block: a for a in self.live for block in a.block_ids}

    @rule(num_tokens=st.integers(1, NUM_BLOCKS * BLOCK_SIZE + 40), owner=st.sampled_from("ab"))
    def allocate(self, num_tokens: int, owner: str) -> None:
        count = (num_tokens + BLOCK_SIZE - 1) // BLOCK_SIZE
        held = self.holders()
        if count > NUM_BLOCKS - len(held):
            with pytest.raises(PoolExhausted):
                self.pool.allocate(num_tokens, owner)
            return
        allocation = self.pool.allocate(num_tokens, owner)
        assert allocation.owner == owner
        assert len(allocation.block_ids) == len(set(allocation.block_ids)) == count
        assert allocation.allocated_tokens == count * BLOCK_SIZE
        assert not held.keys() & set(allocation.block_ids)
        assert allocation.generation not in self.generations
        self.generations.add(allocation.generation)
        self.live.append(allocation)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        allocation = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pool.free(allocation)
        self.dead.append(allocation)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def free_again(self, data: st.DataObject) -> None:
        stale = data.draw(st.sampled_from(self.dead))
        held = self.holders()
        foreign = {block for block in stale.block_ids if block in held and held[block].owner != stale.owner}
        first = next(b for b in stale.block_ids)
        with pytest.raises((DoubleFree, ForeignOwner)) as caught:
            self.pool.free(stale)
        if not foreign:
            assert caught.type is DoubleFree
        elif first in foreign:
            assert caught.type is ForeignOwner

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_as_another(self, data: st.DataObject) -> None:
        allocation = data.draw(st.sampled_from(self.live))
        with pytest.raises(ForeignOwner):
            self.pool.free_blocks("stranger", allocation.block_ids)

    @precondition(lambda self: any(len(a.block_ids) > 1 for a in self.live))
    @rule(data=st.data())
    def free_a_part(self, data: st.DataObject) -> None:
        allocation = data.draw(st.sampled_from([a for a in self.live if len(a.block_ids) > 1]))
        cut = data.draw(st.integers(1, len(allocation.block_ids) - 1))
        self.pool.free_blocks(allocation.owner, allocation.block_ids[:cut])
        self.live.remove(allocation)
        rest = allocation.block_ids[cut:]
        self.live.append(
            Allocation(
                block_ids=rest,
                allocated_tokens=len(rest) * BLOCK_SIZE,
                owner=allocation.owner,
                generation=allocation.generation,
            )
        )

    @invariant()
    def counts_agree(self) -> None:
        held = self.holders()
        assert self.pool.num_in_use == len(held)
        assert self.pool.num_free == NUM_BLOCKS - len(held)
        for owner in "ab":
            assert self.pool.in_use_by(owner) == sum(a.owner == owner for a in held.values())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)


def test_8000_tokens_at_128_are_63_blocks() -> None:
    allocation = BlockPool(100, 128).allocate(8000, "request")
    assert (len(allocation.block_ids), allocation.allocated_tokens) == (63, 8064)


@pytest.mark.parametrize("num_tokens", [0, -1, -128, True, 1.5, "8"])
def test_a_number_of_tokens_that_is_no_positive_int_is_a_value_error(num_tokens: object) -> None:
    pool = BlockPool(4, 16)
    with pytest.raises(ValueError, match="positive int"):
        pool.allocate(num_tokens, "a")  # type: ignore[arg-type]
    assert pool.num_free == 4


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0), (-1, 16), (4, True)])
def test_impossible_pools_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive int"):
        BlockPool(*sizes)


def test_a_block_twice_in_one_call_frees_nothing() -> None:
    pool = BlockPool(4, 16)
    allocation = pool.allocate(32, "a")
    with pytest.raises(DoubleFree):
        pool.free_blocks("a", (allocation.block_ids[0], allocation.block_ids[0]))
    with pytest.raises(ForeignOwner):
        pool.free_blocks("a", (allocation.block_ids[0], 99))
    assert pool.in_use_by("a") == 2
    assert pool.free_owner("a") == 2
    assert pool.free_owner("a") == 0
    assert pool.num_in_use == 0
