"""The end of a run: who may hold what for how long, in runs that are made by hand."""

from __future__ import annotations

from dataclasses import replace

from tests.transfer.simulation.planted.shares import serve_the_last_first
from transfer.config import TransferConfig
from transfer.simulation.faults import Rates
from transfer.simulation.runner import quiet_logs
from transfer.simulation.scenario import RequestPlan, Scenario
from transfer.simulation.world import QUIET_LIMIT_S, Result, World
from transfer.tensors import PlaneSpec

PLAN = RequestPlan(
    number=0, num_rows=20, sender=0, receiver=0, start_s=0.0, sender_first=False, announce_at=0, piece_rows=2,
    gap_s=1.0, deadline_s=None, cancel_side="sender", cancel_at=None, misaligned_round=None, is_mismatched=False,
    take_over_s=30.0, has_key=True, does_sender_know_deadline=False,
)  # fmt: skip


def scenario(*plans: RequestPlan, pool_tokens: int = 16) -> Scenario:
    """One sender, one receiver, and streams whose producers take their time; nothing goes wrong by itself."""
    config = TransferConfig(
        block_size=2, default_allocate_tokens=4, pool_tokens=pool_tokens, credit_window_blocks=2, tick_s=0.1,
        idle_timeout_s=20.0, stream_timeout_s=30.0, ping_interval_s=0.5,
    )  # fmt: skip
    return Scenario(
        seed=1, planes=(PlaneSpec(name="x", dtype="int32", row_shape=(2,)),), config=config, is_encrypted=False,
        num_senders=1, num_receivers=1, admission="at_once", budget_rows=100, requests=plans,
        rates=Rates(), lossy_s=0.0, incidents=(),
    )  # fmt: skip


def play(world: World) -> Result:
    with quiet_logs():
        return world.run()


def test_a_loop_that_begins_anew_late_waits_anew_and_leaks_nothing() -> None:
    """The sender gave up and nobody heard it: its receiver waits for it, then for another, then lets go."""
    world = World(scenario(PLAN))
    network, receiver = world.network, world.receivers[0]
    at = world.timeline.after
    at(0.5, lambda: setattr(network.link("sender-1", "receiver-1"), "num_cuts", 1))
    at(0.6, lambda: world.incidents.cancels.cancel(world.controller.requests[0], "sender"))
    at(19.0, lambda: receiver.process.run(network.endpoints[receiver.address].restart_loop))
    result = play(world)
    assert result.breach is None, result.breach
    assert result.counts["virtual_seconds"] > QUIET_LIMIT_S + 5, "a wait that is longer than without the restart"


def test_a_stream_that_is_held_for_longer_leaks() -> None:
    world = World(scenario(replace(PLAN, take_over_s=70.0)))
    at = world.timeline.after
    at(0.5, lambda: setattr(world.network.link("sender-1", "receiver-1"), "num_cuts", 1))
    at(0.6, lambda: world.incidents.cancels.cancel(world.controller.requests[0], "sender"))
    result = play(world)
    assert result.breach is not None and result.breach.promise == "7: nothing leaks"


def test_two_who_stand_still_must_not_pass_the_only_block_to_and_fro() -> None:
    """Each gives it up in time, so neither keeps it from anybody; and the third, who has rows, never gets it."""
    slow = replace(PLAN, num_rows=4, piece_rows=1, gap_s=60.0)
    quick = replace(PLAN, number=2, num_rows=40, piece_rows=40, gap_s=0.0, start_s=125.0)
    plans = slow, replace(slow, number=1), quick
    assert play(World(scenario(*plans, pool_tokens=2))).breach is None
    with serve_the_last_first():
        breach = play(World(scenario(*plans, pool_tokens=2))).breach
    assert breach is not None and breach.promise == "5: every stream has its turn"
