"""Turns exclude each other and are served in order of asking, also after one that raises."""

import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from kernels import cpu_turn as cpu_turn_module
from kernels.cpu_turn import FairLock, cpu_turn
from tests.waiting import eventually


def wait_until_waiting(lock: FairLock, count: int) -> None:
    eventually(lambda: lock.num_waiting >= count, lambda: f"{lock.num_waiting} of {count} threads wait")


def test_turns_come_in_order_and_one_at_a_time() -> None:
    lock, inside, order = FairLock(), [0], []

    def take(name: int) -> None:
        with lock.turn():
            inside[0] += 1
            assert inside[0] == 1
            order.append(name)
            inside[0] -= 1

    threads = [threading.Thread(target=take, args=(name,), daemon=True) for name in range(6)]
    with lock.turn():
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_until_waiting(lock, count)
        assert order == []
    with lock.turn():  # asked last: everybody before it has had a turn
        assert order == [0, 1, 2, 3, 4, 5]
    for thread in threads:
        thread.join()


def test_a_turn_that_raises_is_given_back() -> None:
    lock = FairLock()
    with pytest.raises(KeyError), lock.turn():
        raise KeyError("inside")
    with lock.turn():
        assert lock.num_waiting == 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def test_one_that_is_interrupted_while_it_waits_holds_up_nobody() -> None:
    lock, is_held, release = FairLock(), threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None and main == threading.get_ident()

    def hold() -> None:
        with lock.turn():
            is_held.set()
            wait_until_waiting(lock, 1)
            signal.pthread_kill(main, signal.SIGUSR1)
            release.wait()

    holder = threading.Thread(target=hold, daemon=True)
    before = signal.signal(signal.SIGUSR1, _interrupt)
    try:
        holder.start()
        is_held.wait()
        with pytest.raises(KeyboardInterrupt), lock.turn():
            pytest.fail("somebody else holds the turn")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert lock.num_waiting == 0
    release.set()
    holder.join()
    with lock.turn():
        assert lock.num_waiting == 0


def test_one_that_is_interrupted_as_its_turn_comes_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(timeout)
            raise KeyboardInterrupt

    lock, is_held, has_turn = FairLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock.turn():
            is_held.set()
            wait_until_waiting(lock, 1)

    def follow() -> None:
        with lock.turn():
            has_turn.set()

    threading.Thread(target=hold, daemon=True).start()
    is_held.wait()
    with monkeypatch.context() as patch:
        patch.setattr(cpu_turn_module, "threading", SimpleNamespace(Event=Interrupted))
        with pytest.raises(KeyboardInterrupt), lock.turn():
            pytest.fail("it was interrupted before")
    threading.Thread(target=follow, daemon=True).start()
    eventually(has_turn.is_set, "a lock that nobody gives back")


def test_other_devices_do_not_wait_for_the_cores() -> None:
    with cpu_turn(torch.device("cpu")), cpu_turn(torch.device("meta")):
        pass
