"""Fuzzes the wire decoder: every input is a message or a MalformedMessage, soon, and nothing grows.

    python -m tests.transfer.fuzz.decoder --inputs 5000000 --seed 0

A message that decodes must encode again and decode to an equal one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from typing import Any

from tests.transfer.fuzz import corpus
from tests.transfer.fuzz.memory import Memory
from tests.transfer.fuzz.mutate import mutate_bytes, mutate_header, repaired
from transfer.errors import LocalProtocolError, MalformedMessage
from transfer.protocol.wire import decode_header, encode_header

MAX_SECONDS_PER_INPUT = 1.0
MAX_GROWTH_KIB = 64 * 1024
KEPT = 4096  # mutants that decoded and that later mutations start from


def check_input(num_frames: int, header: bytes) -> str:
    """The type of the message, or "malformed". AssertionError or the decoder's own error for anything else."""
    started_s = time.thread_time()  # of this thread alone: a busy machine is not to blame on the decoder
    try:
        message = decode_header(header, num_frames)
    except MalformedMessage:
        return "malformed"
    finally:
        assert time.thread_time() - started_s < MAX_SECONDS_PER_INPUT, f"slow: {header[:200].hex()}"
    try:
        again = decode_header(encode_header(message), num_frames)
    except LocalProtocolError:
        return "not sendable"  # a lone surrogate, say, which msgpack reads and does not write
    assert _same(message, again), f"{message} became {again}"
    return type(message).__name__


def _same(one: object, other: object) -> bool:
    """Equality under which a NaN equals itself."""
    return repr(one) == repr(other)


def fuzz(num_inputs: int, seed: int) -> dict[str, Any]:
    """Feed mutants of the corpus, and mutants of mutants that decoded. What came of them."""
    rng = random.Random(seed)
    pool = list(corpus.load().values())
    headers = [header for _, header in pool]
    num_seeds = len(pool)
    outcomes: Counter[str] = Counter(check_input(*one) for one in pool)
    memory: Memory | None = None
    started_s = time.perf_counter()
    for number in range(num_inputs):
        if number == num_inputs // 10:
            memory = Memory()
        num_frames, header = pool[rng.randrange(num_seeds if rng.random() < 0.6 else len(pool))]
        if rng.random() < 0.5:
            header = mutate_header(rng, header)
        if rng.random() < 0.6:
            header = mutate_bytes(rng, header, headers)
            if rng.random() < 0.9:  # else nearly all would fall at the checksum
                header = repaired(header)
        if rng.random() < 0.05:
            num_frames = rng.choice((0, 1, 2, 5, 4096, 4097))
        outcome = check_input(num_frames, header)
        outcomes[outcome] += 1
        if outcome not in ("malformed", "not sendable"):
            kept = (min(num_frames, 255), header[:4096])
            if len(pool) < num_seeds + KEPT:
                pool.append(kept)
            else:
                pool[num_seeds + rng.randrange(KEPT)] = kept
    assert memory is not None
    memory.check(MAX_GROWTH_KIB)
    return {
        "inputs": num_inputs,
        "seconds": round(time.perf_counter() - started_s, 1),
        "grown_kib": memory.grown_kib(),
        "outcomes": dict(outcomes.most_common()),
    }


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=5_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(fuzz(options.inputs, options.seed), indent=2))


if __name__ == "__main__":
    main()
