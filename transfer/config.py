"""TransferConfig: every size, bound and timer of this package, validated once.

Knows nothing of files, environment or command line: `cluster` builds it. Units are in the names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from transfer.errors import ConfigError

MIB = 1024 * 1024
MAX_WAIT_S = 1_000_000  # 12 days; what polls and sockets wait for is counted in milliseconds of 31 bits
TRANSPORTS = ("auto", "ipc", "tcp", "inproc")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """Settings of one worker's transfer side.

    block_size               rows per block; must be equal at both ends
    default_allocate_tokens  rows granted to a stream whose total is not known yet
    pool_tokens              rows the receive pool holds (rounded up to whole blocks)
    input_buffer_tokens      rows the consumer can reserve for announced streams
    credit_window_blocks     blocks a sender may have unacknowledged
    transport                ipc: socket files on one host; tcp: with CURVE; auto: tcp where there are several
    host                     the address that workers bind for tcp; auto: their node's own
    ports                    the ports that they bind there, FIRST-LAST (two for each process); auto: any free ones
    max_streams, max_calls   streams and calls that one worker has open at most
    ping_interval_s          how often a peer with open calls is asked whether it lives
    tick_s                   how often what is due is looked for
    max_message_bytes        cap of one frame; a message may have many (see max_outbound_bytes)
    max_outbound_messages/bytes  cap of what may wait for one peer; max_outbound_bytes so also caps a whole message
    idle_timeout_s           silence of a stream's peer that ends the stream; disuse that closes a streams' connection
    stream_timeout_s         longest wait for a stream's sender to open it, and for the Ack of a block that was sent
    admit_timeout_s          longest wait for the own consumer or the own pool
    seal                     seal payloads everywhere (they always are where connections are encrypted), or do not send
    peer_timeout_s           silence of a peer with open calls after which it is declared lost
    shared_memory            let peers on this host write payload into memory shared with them
    segment_tokens           rows that the memory shared with one peer holds (rounded up to whole blocks)
    shm_checksum             check the payload in shared memory too, not only whose it is
    """

    block_size: int = 128
    default_allocate_tokens: int = 8192
    pool_tokens: int = 65536
    input_buffer_tokens: int = 262144
    credit_window_blocks: int = 16
    max_message_bytes: int = 64 * MIB
    max_streams: int = 4096
    max_calls: int = 16384
    transport: str = "auto"
    host: str = "auto"
    ports: str = "auto"
    stream_timeout_s: float = 120.0
    idle_timeout_s: float = 30.0
    admit_timeout_s: float = 600.0
    peer_timeout_s: float = 10.0
    ping_interval_s: float = 2.0
    tick_s: float = 0.05
    max_outbound_messages: int = 10000
    max_outbound_bytes: int = 1024 * MIB
    seal: bool = False
    shared_memory: bool = True
    segment_tokens: int = 32768
    shm_checksum: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            wrong = not isinstance(value, (int, float)) if kind is float else not isinstance(value, kind)
            if wrong or (isinstance(value, bool) and kind is not bool):
                raise ConfigError(f"transfer.{field.name} must be {kind.__name__}, not {value!r}")
            if kind in (int, float) and not 0 < value < math.inf:
                raise ConfigError(f"transfer.{field.name} must be positive and finite, not {value!r}")
            if kind is float and value > MAX_WAIT_S:
                raise ConfigError(f"transfer.{field.name} is {value} seconds; use at most {MAX_WAIT_S:g}")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transfer.transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}")
        if not self.host:
            raise ConfigError("transfer.host must name an address to bind; the empty string would mean all interfaces")
        _parsed_ports(self.ports)
        if self.ping_interval_s >= self.peer_timeout_s:
            raise ConfigError("transfer.ping_interval_s must be below transfer.peer_timeout_s, or live peers are lost")

    @property
    def port_range(self) -> range | None:
        """The ports that may be bound where an address leaves the choice (port 0); None for any."""
        return _parsed_ports(self.ports)

    @property
    def num_pool_blocks(self) -> int:
        """Blocks in the receive pool."""
        return -(-self.pool_tokens // self.block_size)

    @property
    def num_segment_blocks(self) -> int:
        """Slots in the segment of one peer."""
        return -(-self.segment_tokens // self.block_size)

    @property
    def default_blocks(self) -> int:
        """Blocks of a first grant when the pool can spare them."""
        return -(-self.default_allocate_tokens // self.block_size)


def _parsed_ports(text: str) -> range | None:
    """The ports of "FIRST-LAST", None for "auto". ConfigError for anything else."""
    if text == "auto":
        return None
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
        raise ConfigError(f"transfer.ports must be auto or FIRST-LAST (20000-20199, say), not {text!r}")
    if not 1024 <= int(first) < int(last) <= 65535:
        raise ConfigError(f"transfer.ports {text} must be two ports or more, in order, between 1024 and 65535")
    return range(int(first), int(last) + 1)
