"""Scenario: what a seed means, as plain values: hosts, configuration, streams, and what is going to go wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from transfer.config import TransferConfig
from transfer.simulation.content import DTYPES
from transfer.simulation.faults import INCIDENT_KINDS, MEMORY_KINDS, MESSAGE_KINDS, Incident, Rates
from transfer.tensors import PlaneSpec

ADMISSIONS = ("at_once", "late", "any_order", "oldest_first")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPlan:
    """One thing a client wants: rows from a sender to a receiver, and how its two ends behave.

    announce_at: rows written before the total is said. piece_rows, gap_s: how the producer writes. cancel_at: number of
    the stream's message at which `cancel_side` gives up, or None. misaligned_round: the grant that is falsified.
    """

    number: int
    num_rows: int
    sender: int
    receiver: int
    start_s: float
    sender_first: bool
    announce_at: int
    piece_rows: int
    gap_s: float
    deadline_s: float | None
    cancel_side: str
    cancel_at: int | None
    misaligned_round: int | None
    is_mismatched: bool
    take_over_s: float
    has_key: bool
    does_sender_know_deadline: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A whole run. is_encrypted: connections count as encrypted, so that payloads are sealed and travel apart.

    local_senders: numbers of the senders that run on the machine of the receivers, and so can share memory; where there
    are any, all senders try. in_place: how many producers compute their rows in slots, where they can.
    """

    seed: int
    planes: tuple[PlaneSpec, ...]
    config: TransferConfig
    is_encrypted: bool
    num_senders: int
    num_receivers: int
    admission: str
    budget_rows: int
    requests: tuple[RequestPlan, ...]
    rates: Rates
    lossy_s: float
    incidents: tuple[Incident, ...]
    local_senders: tuple[int, ...] = ()
    in_place: float = 0.0


def draw_scenario(seed: int) -> Scenario:
    """The scenario of `seed`; equal seeds, equal scenarios."""
    dice = random.Random(f"{seed}/scenario")
    is_clean = dice.random() < 0.1
    num_senders, num_receivers = dice.choice((1, 2, 3)), dice.choice((1, 1, 2))
    num_requests = dice.choice((1, dice.randint(2, 8), dice.randint(8, 20), dice.randint(8, 30)))
    config = _config(dice, num_requests)
    requests = tuple(
        _request(dice, number, config, num_senders, num_receivers, is_clean) for number in range(num_requests)
    )
    most_rows = max(plan.num_rows for plan in requests)
    scenario = Scenario(
        seed=seed,
        planes=_planes(dice),
        config=config,
        is_encrypted=dice.random() < 0.3,
        num_senders=num_senders,
        num_receivers=num_receivers,
        admission=dice.choice(ADMISSIONS),
        budget_rows=most_rows + 1 + dice.choice((0, 0, 5, most_rows)),  # another content may have one row more
        requests=requests,
        rates=Rates() if is_clean else _rates(dice),
        lossy_s=0.0 if is_clean else dice.choice((0.0, 2.0, 6.0)),
        incidents=() if is_clean else _incidents(dice, requests, config, _slow_producers(seed)),
    )
    return _sharing_memory(scenario, random.Random(f"{seed}/memory"), is_clean)


def _sharing_memory(scenario: Scenario, dice: random.Random, is_clean: bool) -> Scenario:
    """The same run, with some senders on the machine of the receivers; or without any, as it is."""
    if dice.random() < 0.6:
        return scenario
    config, num_requests = scenario.config, len(scenario.requests)
    num_slots = dice.choice((1, 2, max(1, num_requests // 3), num_requests, 2 * num_requests, 60))
    num_messages = 6 * num_requests + 2 * sum(-(-plan.num_rows // config.block_size) for plan in scenario.requests)
    incidents = [_memory_incident(dice, num_messages) for _ in range(0 if is_clean else dice.choice((0, 1, 2, 4, 6)))]
    config = replace(config, segment_tokens=num_slots * config.block_size, shm_checksum=dice.random() < 0.3)
    local_senders = tuple(number for number in range(scenario.num_senders) if dice.random() < 0.85)
    in_place = dice.choice((0.0, 0.3, 1.0))
    for _ in range(0 if is_clean else dice.choice((0, 1, 2, 4))):  # in the middle of what is done with slots, too
        at_message, target = dice.randint(1, num_messages), 2 * dice.randrange(500)
        incidents.append(Incident(kind="restart_loop", at_message=at_message, target=target, seconds=0.01))
    return replace(
        scenario,
        config=config,
        incidents=tuple(sorted((*scenario.incidents, *incidents), key=lambda incident: incident.at_message)),
        local_senders=local_senders,
        in_place=in_place,
    )


def _memory_incident(dice: random.Random, num_messages: int) -> Incident:
    kind = dice.choice(MEMORY_KINDS)
    is_short = kind != "replay" and dice.random() < 0.7
    return Incident(
        kind=kind,
        at_message=1 if kind == "replay" else dice.choice((1, dice.randint(1, num_messages))),
        target=dice.randrange(1000),
        seconds=dice.uniform(0, 3) if is_short else dice.uniform(3, 30),
    )


def _planes(dice: random.Random) -> tuple[PlaneSpec, ...]:
    names = ("embeddings", "token_ids", "layer.0.k")[: dice.choice((1, 2, 2, 3))]
    shapes: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2))
    return tuple(PlaneSpec(name=name, dtype=dice.choice(DTYPES), row_shape=dice.choice(shapes)) for name in names)


def _config(dice: random.Random, num_requests: int) -> TransferConfig:
    block_size = dice.choice((1, 2, 3, 4, 8))
    few = max(1, num_requests // 3)
    pool_blocks = dice.choice((1, few, num_requests, num_requests, num_requests + 1, 2 * num_requests, 60))
    return TransferConfig(
        block_size=block_size,
        default_allocate_tokens=dice.choice((1, block_size, 2 * block_size + 1, 8 * block_size, 100 * block_size)),
        pool_tokens=pool_blocks * block_size,
        credit_window_blocks=dice.choice((1, 2, 3, 4, 8, 16)),
        tick_s=dice.choice((0.05, 0.1, 0.25)),
        idle_timeout_s=20.0,
        stream_timeout_s=30.0,
        ping_interval_s=dice.choice((0.5, 2.0)),
        max_outbound_messages=dice.choice((40, 10000)),
    )


def _request(
    dice: random.Random, number: int, config: TransferConfig, num_senders: int, num_receivers: int, is_clean: bool
) -> RequestPlan:
    size = config.block_size
    full = size * dice.choice((dice.randint(1, 12), dice.randint(10, 40)))
    num_rows = dice.choice((0, 1, size, full, full, full + dice.randint(0, size), dice.randint(0, 12 * size)))
    return RequestPlan(
        number=number,
        num_rows=num_rows,
        sender=dice.randrange(num_senders),
        receiver=dice.randrange(num_receivers),
        start_s=dice.choice((0.0, dice.uniform(0, 1), dice.uniform(0, 5))),
        sender_first=dice.random() < 0.3,
        announce_at=dice.choice((0, 0, num_rows, dice.randint(0, num_rows))),
        piece_rows=dice.choice((1, size, 3 * size + 1, 1000)),
        gap_s=dice.choice((0.0, 0.001, 0.05, 0.4)),
        deadline_s=dice.uniform(0.01, 10) if not is_clean and dice.random() < 0.05 else None,
        cancel_side=dice.choice(("sender", "receiver")),
        cancel_at=dice.choice((dice.randint(0, 5), dice.randint(0, 60)))
        if not is_clean and dice.random() < 0.15
        else None,
        misaligned_round=dice.choice((0, 0, 1)) if not is_clean and dice.random() < 0.02 else None,
        is_mismatched=not is_clean and dice.random() < 0.02,
        take_over_s=dice.choice((0.0, 10.0, 30.0)),
        has_key=dice.random() < 0.8,
        does_sender_know_deadline=dice.random() < 0.5,
    )


def _rates(dice: random.Random) -> Rates:
    level = dice.choice((0.0, 0.01, 0.05, 0.15))
    kinds = dice.sample(MESSAGE_KINDS, dice.randint(1, len(MESSAGE_KINDS)))
    return Rates(**{kind: level / len(kinds) * dice.uniform(0.5, 2) for kind in kinds})


def _slow_producers(seed: int) -> random.Random:
    """Dice of their own: pauses of minutes are rare, for they make long runs."""
    return random.Random(f"{seed}/slow producers")


def _incidents(
    dice: random.Random, requests: tuple[RequestPlan, ...], config: TransferConfig, slow_dice: random.Random
) -> tuple[Incident, ...]:
    num_blocks = sum(-(-plan.num_rows // config.block_size) for plan in requests)
    num_messages = 6 * len(requests) + 2 * num_blocks  # about what a run without faults carries
    incidents = []
    for _ in range(dice.choice((0, 1, 2, 4, 6, 9, 14))):
        is_long = dice.random() < 0.15
        incidents.append(
            Incident(
                kind=dice.choice((*INCIDENT_KINDS, "cancel", "cancel")),
                at_message=dice.randint(1, max(2, num_messages)),
                target=dice.randrange(1000),
                seconds=dice.uniform(18, 45)
                if is_long
                else dice.choice((0.01, dice.uniform(0, 0.5), dice.uniform(0, 8))),
            )
        )
    for _ in range(slow_dice.choice((0, 0, 0, 0, 0, 1, 2, 4))):
        incidents.append(
            Incident(
                kind="slow_producer",
                at_message=slow_dice.randint(1, max(2, num_messages // 2)),
                target=slow_dice.randrange(1000),
                seconds=slow_dice.choice((slow_dice.uniform(5, 60), slow_dice.uniform(60, 180))),
            )
        )
    return tuple(sorted(incidents, key=lambda incident: incident.at_message))
