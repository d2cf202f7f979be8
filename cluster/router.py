"""Router: which replica takes the next request. A pure function over a snapshot of the workers.

Embedding workers are chosen by rendezvous hashing of the media, so that the same image meets the same cache, unless
that worker already carries more than its fair share; all others by the fewest running requests.
(Rendezvous hashing: Thaler and Ravishankar, 1998. Bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import xxhash

from cluster.errors import NoWorker

WorkerKind = Literal["embedding", "language", "prefill", "decode"]
LOAD_FACTOR = 1.25


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """One worker as the router sees it. num_running: requests handed to it that have not ended."""

    name: str
    kind: WorkerKind
    is_alive: bool
    num_running: int


def is_split(workers: Sequence[WorkerView]) -> bool:
    """Whether prompts are computed on other workers than answers."""
    return any(worker.kind == "decode" for worker in workers)


def choose_language(
    workers: Sequence[WorkerView], excluded: Collection[str] = (), kind: WorkerKind = "language"
) -> str:
    """The live worker of this kind with the fewest requests; the first by name among equals. Raises NoWorker."""
    return min(_candidates(workers, kind, excluded), key=lambda w: (w.num_running, w.name)).name


def choose_embedding(workers: Sequence[WorkerView], affinity_key: str, excluded: Collection[str] = ()) -> str:
    """The live embedding worker that `affinity_key` prefers among those below the load bound. Raises NoWorker."""
    candidates = _candidates(workers, "embedding", excluded)
    bound = LOAD_FACTOR * (sum(w.num_running for w in candidates) + 1) / len(candidates)
    below = [w for w in candidates if w.num_running < bound]
    return max(below, key=lambda w: xxhash.xxh3_64_intdigest(f"{w.name}|{affinity_key}".encode())).name


def can_risk(workers: Sequence[WorkerView], kinds: Collection[str]) -> bool:
    """Whether one live worker of each kind may be lost and another is left to serve, if there ever was another."""
    alive = [[worker.is_alive for worker in workers if worker.kind == kind] for kind in kinds]
    return all(sum(of_kind) >= min(2, len(of_kind)) > 0 for of_kind in alive)


def _candidates(workers: Sequence[WorkerView], kind: WorkerKind, excluded: Collection[str]) -> list[WorkerView]:
    candidates = [w for w in workers if w.kind == kind and w.is_alive and w.name not in excluded]
    if not candidates:
        num_known = sum(w.kind == kind for w in workers)
        raise NoWorker(f"none of the {num_known} {kind} workers can take the request now; try again shortly")
    return candidates
