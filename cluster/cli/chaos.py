"""`tandem chaos`: a relay that breaks links on purpose, between two workers or before the gateway.

It relays any protocol over TCP (or a Unix socket) from --listen to --upstream until it is told to stop. TCP loses,
repeats and reorders no bytes by itself, so each fault is what an application can really meet: a link that ends, stalls,
slows down or carries wrong bytes. The same seed and the same traffic meet the same faults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import ExitStack
from typing import Any

from cluster.cli.signals import StopSignal
from cluster.errors import ConfigError
from transfer.chaos.plan import DIRECTIONS, Faults
from transfer.chaos.proxy import ChaosProxy

UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}
EXAMPLES = """\
examples:
  tandem chaos --listen 127.0.0.1:9000 --upstream 127.0.0.1:8000 --delay 50 --jitter 20
      a slow network before the gateway: ask http://127.0.0.1:9000 instead
  tandem chaos --listen 127.0.0.1:9001 --upstream 127.0.0.1:7001 --cut-every 4M --seed 7
      a link to a process with a known port that breaks after every 4 MiB
  tandem chaos --listen 127.0.0.1:9001 --upstream 127.0.0.1:7001 --cut-after 10M --half-open
      a peer that vanishes without a word: both ends must notice by silence
"""


def byte_count(text: str) -> int:
    """For argparse: 1500, 64K, 10M or 1G (powers of 1024)."""
    number, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    return int(number) * unit


# flag -> (field of Faults, type, metavar, help)
FLAGS: dict[str, tuple[str, Any, str, str]] = {
    "--drop": (
        "drop", float, "P",
        "probability, per segment that passes, that bytes of it are swallowed and the link is cut right after: "
        "the end that sent them believes they arrived",
    ),
    "--corrupt": (
        "corrupt", float, "P",
        "probability, per segment, that one bit of it is flipped (TCP's own checksum does not see it)",
    ),
    "--delay": ("delay_ms", float, "MS", "every byte comes this many milliseconds later"),
    "--jitter": ("jitter_ms", float, "MS", "... plus or minus up to this many, by segment; bytes stay in order"),
    "--throttle": (
        "throttle_bytes_per_s", byte_count, "BYTES_PER_S",
        "at most this many bytes a second, in each direction of each link",
    ),
    "--cut-after": (
        "cut_after_bytes", byte_count, "BYTES",
        "once: cut the link over which this byte passes, counted over all links; exactly so many get through",
    ),
    "--cut-every": ("cut_every_bytes", byte_count, "BYTES", "cut each link after this many bytes of its own"),
    "--segment": (
        "segment_bytes", byte_count, "BYTES", "what drop, corrupt and jitter are drawn for (default 16K)",
    ),
}  # fmt: skip


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser(
        "chaos",
        help="relay a TCP port and break its links on purpose",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="where to accept (port 0: any free one)")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT", help="where to relay to (or ipc:///PATH)")
    for flag, (field, kind, metavar, text) in FLAGS.items():
        parser.add_argument(flag, dest=field, type=kind, default=None, metavar=metavar, help=text)
    parser.add_argument(
        "--half-open", action="store_true", help="a cut tells neither end: the link stays up and swallows everything"
    )
    parser.add_argument(
        "--reset", action="store_true", help="a cut is a TCP reset, which may overtake bytes on their way"
    )
    parser.add_argument(
        "--direction", choices=sorted(DIRECTIONS), default="both",
        help="which bytes the faults concern and count: up (to the upstream), down, or both (default)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="what the random draws start from (0)")
    parser.add_argument("--json", metavar="FILE", help="write the counters here at the end")
    parser.set_defaults(run=run, ray_address=ray_address)


def run(options: argparse.Namespace) -> int:
    """0 once it was told to stop."""
    given = {field: getattr(options, field) for field, *_ in FLAGS.values() if getattr(options, field) is not None}
    faults = Faults(**given, half_open=options.half_open, reset=options.reset, direction=options.direction)
    stop = StopSignal()
    with ExitStack() as stack:
        report = None
        if options.json is not None:
            try:
                report = stack.enter_context(open(options.json, "w", encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"cannot write --json {options.json}: {error.strerror}") from error
        proxy = stack.enter_context(ChaosProxy(options.listen, options.upstream, faults, seed=options.seed))
        stop.expect()
        print(f"relaying {proxy.address} to {options.upstream} (Ctrl-C stops)", file=sys.stderr, flush=True)
        stop.wait()
        proxy.close()
        counts, never = proxy.counts(), proxy.never_fired()
        print(_line(counts, never), flush=True)
        if report is not None:
            record = {"listen": proxy.address, "upstream": options.upstream, "seed": options.seed,
                      "faults": dataclasses.asdict(faults), "counts": counts, "never_fired": never}  # fmt: skip
            json.dump(record, report, indent=2)
            report.write("\n")
    return 0


def _line(counts: dict[str, int], never: tuple[str, ...]) -> str:
    text = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
    return text + (f"; asked for but never fired: {', '.join(never)}" if never else "")
