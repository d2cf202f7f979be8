"""The path of sealed payloads beside encrypted connections: a PULL per receive side, a PUSH per peer, without CURVE.

Blocks and Probes that their sender seals itself need no second encryption, which costs more than all the rest. They go
one way, to whoever gave us the token of its socket, and nothing else is taken there. Knows sockets and frames; whose a
message is, its seal must tell. Sockets belong to the thread that uses them.
"""

from __future__ import annotations

import zmq

from transfer.config import TransferConfig
from transfer.endpoints.addresses import SEALED_DOMAIN, split_sealed, tcp_host
from transfer.endpoints.zmq_sockets import HIGH_WATER_MARK, bind_socket, new_socket
from transfer.errors import ConfigError, MalformedMessage
from transfer.protocol.messages import Block, Message, Probe
from transfer.protocol.wire import decode_header
from transfer.protocol.wire_fields import MAX_PLANES

MAX_SEALED_HEADER_BYTES = 1024  # Blocks and Probes have short ones
ON_SEALED_PATH = (Block, Probe)


def bind_sealed(
    context: zmq.Context[zmq.Socket[bytes]], config: TransferConfig, control_address: str, max_frame_bytes: int
) -> zmq.Socket[bytes]:
    """A socket beside the one at `control_address`, on a port of its own. ConfigError when there is none."""
    host = tcp_host(control_address)
    sock = new_socket(context, zmq.PULL, config)
    sock.setsockopt(zmq.MAXMSGSIZE, max(max_frame_bytes, MAX_SEALED_HEADER_BYTES))
    sock.setsockopt(zmq.RCVHWM, min(HIGH_WATER_MARK, 2 * config.credit_window_blocks))
    sock.setsockopt(zmq.ZAP_DOMAIN, SEALED_DOMAIN)
    sock.setsockopt(zmq.PLAIN_SERVER, 1)
    sock.setsockopt(zmq.IPV6, int("[" in host))
    try:
        bind_socket(sock, f"tcp://{host}:0", config)
    except zmq.ZMQError as error:
        sock.close()
        raise ConfigError(f"cannot listen for sealed payloads beside {control_address}: {error.strerror}") from error
    return sock


def connect_sealed(context: zmq.Context[zmq.Socket[bytes]], config: TransferConfig, address: str) -> zmq.Socket[bytes]:
    """The way to a peer's socket. ConfigError for another kind of address."""
    plain, token = split_sealed(address)
    sock = new_socket(context, zmq.PUSH, config)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_SEALED_HEADER_BYTES)  # nothing comes back
    sock.setsockopt(zmq.PLAIN_USERNAME, SEALED_DOMAIN)
    sock.setsockopt(zmq.PLAIN_PASSWORD, token.encode("ascii"))
    sock.setsockopt(zmq.IPV6, int("[" in plain))
    sock.connect(plain)
    return sock


def decode_sealed(header: bytes, num_frames: int) -> Message:
    """The Block or Probe of a header that came with so many frames. MalformedMessage for anything else."""
    if len(header) > MAX_SEALED_HEADER_BYTES or num_frames > MAX_PLANES:
        raise MalformedMessage(
            f"a header of {len(header)} bytes and {num_frames} frames on the path of sealed payloads"
        )
    message = decode_header(header, num_frames)
    if not isinstance(message, ON_SEALED_PATH):
        raise MalformedMessage(f"a {type(message).__name__} on the path of sealed payloads")
    return message
