"""A process of its own at one end of a segment: `python -m tests.transfer.segment_peer ROLE FOLDER-OR-PATH SECRET`.

`serve` offers a segment and prints its socket and generation; `fetch` maps the one it is told of on standard input.
Both then obey single words on standard input: `fill` writes and seals every slot, `check` prints their first bytes.
"""

from __future__ import annotations

import os
import sys

from tests.transfer.patience import allow_for_handshakes
from tests.transfer.segment_values import LAYOUT, TICKET_ID, fill, first_bytes
from transfer.memory.segment_passing import fetch
from transfer.memory.segment_server import SegmentOffer, SegmentServer
from transfer.memory.segments import OwnedSegment, Segment, attach
from transfer.protocol.ticket import Ticket


def main() -> None:
    role, place, secret = sys.argv[1:]
    allow_for_handshakes()
    ticket = Ticket(stream_id=TICKET_ID, epoch=1, owner="test", secret=bytes.fromhex(secret))
    if role == "serve":
        segment: Segment = OwnedSegment(LAYOUT)
        server = SegmentServer(place)
        offer = SegmentOffer(
            ticket=ticket,
            generation=segment.generation,
            fd=segment.fd,
            num_bytes=LAYOUT.num_bytes,
            on_lost=lambda: print("lost", flush=True),
        )
        server.offer(offer)
        print(server.path, segment.generation, flush=True)
    else:
        generation = int(sys.stdin.readline())
        fetched = fetch(place, ticket, generation)
        segment = attach(fetched.fd, LAYOUT, generation)
        os.close(fetched.fd)
        print("attached", flush=True)
    for line in sys.stdin:
        if line.strip() == "fill":
            fill(segment, ticket)
            print("filled", flush=True)
        elif line.strip() == "check":
            print(first_bytes(segment), flush=True)


if __name__ == "__main__":
    main()
