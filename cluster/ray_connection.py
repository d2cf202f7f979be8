"""Ray under this process: started here or joined, without its noise and with our own signal handlers.

What can be told before Ray is asked (nobody listens there, too few GPUs) is told at once, as a ConfigError.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, get_args

import ray
import torch

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.router import WorkerKind

OBJECT_STORE_BYTES = 100 * 1024 * 1024  # nothing of ours goes through the object store
PROBE_TIMEOUT_S = 10.0
MAX_HELD_BYTES = 1024 * 1024
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


def connect(config: ClusterConfig, ray_address: str | None, on_status: Callable[[str], None]) -> bool:
    """Join the Ray at `ray_address` (None: start one here); False when this process has joined one before. Raises
    ConfigError.
    """
    if ray.is_initialized():
        return False
    workers = config.workers
    if ray_address:
        on_status(f"connecting to Ray at {ray_address}")
        _require_listener(ray_address)
        _init_ray(f"cannot join Ray at {ray_address}", address=ray_address)
        return True
    _require_gpus(config)
    on_status("starting Ray on this machine")
    needed = sum(workers.counts.values()) * workers.num_cpus
    _init_ray(
        "cannot start Ray on this machine",
        address="local",
        include_dashboard=False,
        num_cpus=max(os.cpu_count() or 1, int(needed + 0.999)),
        resources={role_resource(kind): 1000.0 for kind in (*get_args(WorkerKind), "gateway")},  # this host has all
        object_store_memory=OBJECT_STORE_BYTES,
    )
    return True


def disconnect() -> None:
    """Leave Ray, and end it where `connect` started it. For who connected before making clusters."""
    ray.shutdown()


def role_resource(kind: str) -> str:
    """What a node offers in Ray that is to run processes of this kind, where workers.placement is "roles"."""
    return f"tandem-{kind}"


def _init_ray(failed: str, **options: Any) -> None:
    said = ""
    try:
        with _own_signal_handlers(), _held_back_stderr() as held:
            try:
                ray.init(logging_level=logging.ERROR, **options)
            except BaseException:
                said = held()
                logger.debug("Ray said:\n%s", said)
                raise
    except Exception as error:  # of many kinds; that its processes were too slow to start is a bare Exception
        cause = " ".join(str(error).split())
        if "InvalidAuthToken" in said:
            cause += "; its token is another one than RAY_AUTH_TOKEN or ~/.ray/auth_token here"
        raise ConfigError(f"{failed}: {cause}") from error


@contextmanager
def _held_back_stderr() -> Iterator[Callable[[], str]]:
    """What anything in this process writes to stderr, Ray's C++ side included, comes out after the block, unless it was
    taken by a call of what is yielded. Python's settings of logging do not reach that side.
    """
    with tempfile.TemporaryFile() as held:
        taken, real = 0, -1

        def take() -> str:
            nonlocal taken
            sys.stderr.flush()
            text = os.pread(held.fileno(), MAX_HELD_BYTES, taken)
            taken += len(text)
            return text.decode(errors="replace")

        def put_back() -> None:
            nonlocal real
            with _signals_wait():
                if real >= 0:
                    rest = take()
                    os.dup2(real, 2)
                    os.close(real)
                    real = -1
                    sys.stderr.write(rest)

        try:
            try:
                with _signals_wait(), suppress(OSError):  # closed: nothing comes out anyhow
                    sys.stderr.flush()
                    real = os.dup(2)
                    os.dup2(held.fileno(), 2)
                yield take
            finally:
                put_back()
        finally:  # where the one signal that raises came between that line and its first step
            put_back()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals are handled after the block: a handler that raises could otherwise end it halfway."""
    if threading.current_thread() is not threading.main_thread():  # no handler runs here
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """The handlers of before, again, after the block. Ray puts one for SIGTERM in the place of whatever is there, which
    would end this process with nothing taken down; a signal that came to that one meanwhile is handed on to ours.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler can be set there, by Ray neither
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    except SystemExit as error:
        restore()
        if error.code == signal.SIGTERM and callable(before[signal.SIGTERM]):
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        restore()


def _require_listener(address: str) -> None:
    """Raises ConfigError at once where nobody listens at HOST:PORT; Ray would try for more than a minute."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return  # "auto", or a URL: Ray's to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"nothing listens at the Ray address {address}: {error}") from error


def _require_gpus(config: ClusterConfig) -> None:
    """Raises ConfigError when this machine, which is to be the whole cluster, has too few."""
    workers = config.workers
    per_worker = workers.num_gpus if workers.num_gpus >= 0 else float(config.model.device.startswith("cuda"))
    num_needed = per_worker * sum(workers.counts.values())
    if torch.cuda.device_count() < num_needed:
        raise ConfigError(
            f"the workers need {num_needed:g} GPUs and this machine has {torch.cuda.device_count()}; set "
            "workers.num_gpus to a share (0.5, say), use --device cpu, or join a Ray cluster with --ray-address"
        )


def wants_gpu(device: str) -> bool:
    """Whether a worker of this device setting is to have a GPU of the cluster."""
    if device == "auto":
        return torch.cuda.is_available() or ray.cluster_resources().get("GPU", 0) > 0
    return device.startswith("cuda")
