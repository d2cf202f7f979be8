"""Who is held to be what crashes workers: the rules by themselves, and against simulated clusters with one culprit."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.directory import WorkerAddress
from cluster.router import WorkerView, can_risk
from cluster.suspects import Suspects, Verdict

W0, W1, W2, W3 = (WorkerAddress(name=f"w{i}", kind="language", address=f"inproc://w{i}") for i in range(4))


def _suspects(*alive: WorkerAddress) -> Suspects[str]:
    return Suspects(lambda worker: worker in alive)


def _enter(suspects: Suspects[str], request: str, worker: WorkerAddress) -> None:
    """It runs there, and the worker was heard from since."""
    suspects.enter(request, [worker])
    suspects.took(request, worker)


def _always(kinds: set[str]) -> bool:
    return True


def test_the_only_one_that_ran_at_two_crashes_is_guilty() -> None:
    suspects = _suspects()
    _enter(suspects, "bad", W0)
    _enter(suspects, "other", W0)
    assert suspects.judge("bad", W0, is_sure=False) is Verdict.ANEW
    assert suspects.judge("other", W0, is_sure=False) is Verdict.ANEW
    _enter(suspects, "bad", W1)
    _enter(suspects, "other", W2)
    _enter(suspects, "third", W1)
    assert suspects.judge("third", W1, is_sure=False) is Verdict.ANEW
    assert suspects.judge("bad", W1, is_sure=False) is Verdict.GUILTY
    assert suspects.judge("bad", W1, is_sure=False) is Verdict.GUILTY, "it stays so until it has ended"
    assert suspects.judge("other", W2, is_sure=True) is Verdict.ANEW, "the first crash is explained"


def test_one_worker_crashes_once() -> None:
    suspects = _suspects()
    suspects.enter("one", [W0])
    assert suspects.judge("one", W0, is_sure=True) is Verdict.ANEW
    assert suspects.judge("one", W0, is_sure=True) is Verdict.ANEW


def test_a_worker_that_answers_after_all_did_not_crash_unless_it_said_so() -> None:
    for is_sure, verdict in ((False, Verdict.ANEW), (True, Verdict.GUILTY)):
        alive: set[WorkerAddress] = set()
        suspects: Suspects[str] = Suspects(alive.__contains__)
        _enter(suspects, "one", W0)
        assert suspects.judge("one", W0, is_sure=is_sure) is Verdict.ANEW
        alive.add(W0)
        _enter(suspects, "one", W1)
        assert suspects.judge("one", W1, is_sure=False) is verdict


def test_the_loss_of_a_worker_that_lives_counts_neither_at_once_nor_when_it_dies_later() -> None:
    alive = {W1}
    suspects: Suspects[str] = Suspects(alive.__contains__)
    _enter(suspects, "one", W0)
    assert suspects.judge("one", W0, is_sure=False) is Verdict.ANEW
    _enter(suspects, "one", W1)
    assert suspects.judge("one", W1, is_sure=False) is Verdict.ANEW, "only the link to it broke"
    alive.clear()
    _enter(suspects, "one", W2)
    assert suspects.judge("one", W2, is_sure=False) is Verdict.GUILTY, "of W0 and W2"
    assert _suspects_after_a_link_broke() is Verdict.ANEW


def _suspects_after_a_link_broke() -> Verdict:
    """Of a request that lost the link to a worker, which dies afterwards, and then another worker."""
    alive = {W0}
    suspects: Suspects[str] = Suspects(alive.__contains__)
    _enter(suspects, "one", W0)
    suspects.judge("one", W0, is_sure=False)
    alive.clear()
    _enter(suspects, "one", W1)
    return suspects.judge("one", W1, is_sure=False)


def test_a_worker_that_was_dead_before_it_was_asked_counts_for_nobody_and_hides_nobody() -> None:
    suspects = _suspects()
    suspects.enter("untaken", [W0])
    _enter(suspects, "taken", W0)
    for name in ("untaken", "taken"):
        assert suspects.judge(name, W0, is_sure=False) is Verdict.ANEW
        _enter(suspects, name, W1)
    assert suspects.judge("untaken", W1, is_sure=False) is Verdict.ANEW, "one crash is all that is sure of it"
    assert suspects.judge("taken", W1, is_sure=False) is Verdict.TRIAL, "the other one may have been the cause of both"
    suspects.took("stranger", W1)
    suspects.enter("stranger", [W2])
    assert suspects.judge("stranger", W2, is_sure=False) is Verdict.ANEW


def _two_of_two() -> Suspects[str]:
    """Both of "bad" and "good" ran at two crashes and wait."""
    suspects = _suspects()
    for worker in (W0, W1):
        suspects.enter("good", [worker])
        suspects.enter("bad", [worker])
        verdicts = {name: suspects.judge(name, worker, is_sure=True) for name in ("good", "bad")}
    assert set(verdicts.values()) == {Verdict.TRIAL}
    suspects.wait("good")
    suspects.wait("bad")
    return suspects


def test_several_that_ran_at_both_are_tried_one_at_a_time() -> None:
    suspects = _two_of_two()
    assert suspects.release(lambda kinds: False) == []
    assert suspects.release(_always) == ["good"] and suspects.num_waiting == 1
    assert suspects.release(_always) == []
    suspects.enter("good", [W2])
    suspects.leave("good")
    assert suspects.release(_always) == ["bad"]
    suspects.enter("bad", [W2])
    assert suspects.judge("bad", W2, is_sure=True) is Verdict.GUILTY


def test_the_guilty_one_s_crashes_are_held_against_nobody_else() -> None:
    suspects = _two_of_two()
    assert suspects.withdraw("good") and not suspects.withdraw("good")
    suspects.wait("good")
    assert suspects.release(_always) == ["bad"]
    suspects.enter("bad", [W2])
    suspects.enter("young", [W2])
    assert suspects.judge("young", W2, is_sure=True) is Verdict.ANEW
    assert suspects.judge("bad", W2, is_sure=True) is Verdict.GUILTY
    assert suspects.release(lambda kinds: False) == ["good"], "it is no suspect any more"


def test_a_trial_leaves_another_worker_to_serve_where_there_is_one() -> None:
    def views(*alive: bool) -> list[WorkerView]:
        return [WorkerView(name=f"w{i}", kind="language", is_alive=a, num_running=0) for i, a in enumerate(alive)]

    assert can_risk(views(True), ["language"]) and can_risk(views(True, True, False), ["language"])
    assert not can_risk(views(False), ["language"]) and not can_risk(views(True, False), ["language"])
    assert not can_risk([], ["language"]) and not can_risk(views(True, True), ["language", "embedding"])


@given(num_requests=st.integers(1, 12), num_workers=st.integers(2, 5), seed=st.integers(0, 2**32))
def test_one_culprit_among_many_is_found_within_three_crashes_and_nobody_else_is_blamed(
    num_requests: int, num_workers: int, seed: int
) -> None:
    rng = random.Random(seed)
    suspects: Suspects[int] = Suspects(lambda worker: False)
    serial = 0
    workers: list[WorkerAddress] = []
    running: dict[int, WorkerAddress] = {}

    def start(request: int) -> None:
        running[request] = rng.choice(workers)
        suspects.enter(request, [running[request]])

    def spawn() -> WorkerAddress:
        nonlocal serial
        serial += 1
        return WorkerAddress(name=f"w{serial}", kind="language", address=f"inproc://w{serial}")

    workers += [spawn() for _ in range(num_workers)]
    culprit = rng.randrange(num_requests)
    for request in range(num_requests):
        start(request)
    num_crashes, is_found = 0, False
    while culprit in running:
        crashed = running[culprit]
        num_crashes += 1
        workers[workers.index(crashed)] = spawn()
        there = [request for request, worker in running.items() if worker == crashed]
        rng.shuffle(there)
        for request in there:
            verdict = suspects.judge(request, crashed, is_sure=True)
            del running[request]
            is_found |= verdict is Verdict.GUILTY
            assert verdict is not Verdict.GUILTY or request == culprit
            if verdict is Verdict.ANEW:
                start(request)
            elif verdict is Verdict.TRIAL:
                suspects.wait(request)
            else:
                suspects.leave(request)
        while not is_found and culprit not in running:
            for request in suspects.release(_always):
                start(request)
            ends = [request for request in running if request != culprit and rng.random() < 0.7] or list(running)
            for request in ends:
                if request != culprit:
                    del running[request]
                    suspects.leave(request)
    assert is_found and num_crashes in (2, 3)
    assert num_crashes == 2 or num_requests > 1
