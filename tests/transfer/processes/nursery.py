"""A process that has loaded what peers need and forks one per request: starting a peer takes milliseconds.

    python -m tests.transfer.processes.nursery FD

FD is one end of a Unix socket. Each message on it brings one descriptor, the new peer's control socket; the answer is
the peer's process id. End of input ends the nursery; its peers end with their own control sockets.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import torch

from tests.transfer.patience import allow_for_handshakes
from tests.transfer.processes.peer import serve


def main(descriptor: int) -> None:
    """Fork peers until the input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a peer: the kernel forgets it at once
    torch.set_num_threads(1)
    allow_for_handshakes()
    with socket.socket(fileno=descriptor) as requests:
        while True:
            data, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
            if not data:
                return
            control = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                requests.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                code = 1
                try:
                    serve(control)
                    code = 0
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            control.close()
            requests.sendall(pid.to_bytes(4, "big"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
