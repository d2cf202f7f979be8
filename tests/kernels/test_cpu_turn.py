"""Turns exclude each other and are served in order of asking, also after one that raises."""

import threading
import time

import pytest
import torch

from kernels.cpu_turn import FairLock, cpu_turn


def wait_until_waiting(lock: FairLock, count: int) -> None:
    deadline = time.monotonic() + 30
    while lock.num_waiting < count:
        assert time.monotonic() < deadline, f"{lock.num_waiting} of {count} threads wait"
        time.sleep(0.001)


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


def test_other_devices_do_not_wait_for_the_cores() -> None:
    with cpu_turn(torch.device("cpu")), cpu_turn(torch.device("meta")):
        pass
