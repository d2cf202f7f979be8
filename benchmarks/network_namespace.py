"""A network namespace of its own for a pair of processes, so that their loopback has known congestion control.

Linux only, by the kernel's own calls; where it is not allowed, `isolate` says so and nothing changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def isolate(congestion: str) -> bool:
    """Move this process (before it has other threads) to a namespace with only a loopback; False when not allowed."""
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNET
    if _call("unshare", flags) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    try:
        CONGESTION.write_text(congestion, encoding="ascii")
    except OSError:
        return True  # isolated all the same; `congestion_control` tells what is used
    return True


def join(process_id: int) -> None:
    """Move this process (before it has other threads) to the namespace of another one. OSError when that fails."""
    kinds = ("net",) if os.geteuid() == 0 else ("user", "net")
    for kind in kinds:
        with open(f"/proc/{process_id}/ns/{kind}", encoding="ascii") as namespace:
            if _call("setns", namespace.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot join the {kind} namespace of process {process_id}")


def congestion_control() -> str:
    """What new TCP connections of this process use."""
    return CONGESTION.read_text(encoding="ascii").strip() if CONGESTION.exists() else "unknown"


def _call(name: str, *arguments: int) -> int:
    """A function of the C library; -1 where there is none of that name."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    return -1 if function is None else int(function(*arguments))
