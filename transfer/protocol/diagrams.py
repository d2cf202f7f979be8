"""The protocol's state diagrams and tables, from `state`.

`python -m transfer.protocol.diagrams --write docs/protocol.md` writes them.

Each machine becomes a mermaid state diagram and a table, between markers of the page; a test asserts that the page
holds what the tables say. Without --write the text goes to standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from transfer.protocol.state import RECEIVER_TABLE, REMOTE_EVENTS, SENDER_TABLE, TERMINAL, ReceiverState, SenderState

MACHINES: dict[str, Mapping[tuple[Enum, Enum], Enum]] = {"sender": SENDER_TABLE, "receiver": RECEIVER_TABLE}  # type: ignore[dict-item]
FIRST: dict[str, Enum] = {"sender": SenderState.IDLE, "receiver": ReceiverState.REGISTERED}


def diagram(name: str) -> str:
    """The mermaid diagram of one machine; arrows that share both ends share one label."""
    table, failed = MACHINES[name], {state for state in TERMINAL if state.value == "failed"}
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), following in table.items():
        if following not in failed:
            arrows.setdefault((state.value, following.value), []).append(event.value)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {FIRST[name].value}"]
    lines += [f"    {start} --> {end}: {', '.join(events)}" for (start, end), events in arrows.items()]
    lines += [f"    {state.value} --> [*]" for state in _states(name) if state in TERMINAL and state not in failed]
    return "\n".join([*lines, "```"])


def table(name: str) -> str:
    """The whole table of one machine; events of the peer are marked."""
    moves, events = MACHINES[name], list(dict.fromkeys(event for _, event in MACHINES[name]))
    heads = [f"{event.value}{' ←' if event in REMOTE_EVENTS else ''}" for event in events]
    lines = [f"| {name} | {' | '.join(heads)} |", "|---" * (len(events) + 1) + "|"]
    for state in _states(name):
        if state in TERMINAL:
            continue
        cells = [moves[state, event].value if (state, event) in moves else "" for event in events]
        lines.append(f"| {state.value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with everything between the markers replaced. ValueError where a marker is missing."""
    for name in MACHINES:
        start, end = markers(name)
        if start not in text or end not in text:
            raise ValueError(f"the page lacks {start} or {end}")
        before, rest = text.split(start, 1)
        after = rest.split(end, 1)[1]
        text = f"{before}{start}\n\n{diagram(name)}\n\n{table(name)}\n\n{end}{after}"
    return text


def markers(name: str) -> tuple[str, str]:
    """What encloses the generated text of one machine."""
    return f"<!-- generated: {name} -->", f"<!-- end: {name} -->"


def _states(name: str) -> list[Enum]:
    return list(type(FIRST[name]))


def main(arguments: list[str] | None = None) -> int:
    """Print, or write into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.protocol.diagrams", description="state diagrams of the protocol"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page whose marked parts are replaced")
    options = parser.parse_args(arguments)
    if options.write is None:
        sys.stdout.write("\n\n".join(f"{diagram(name)}\n\n{table(name)}" for name in MACHINES) + "\n")
        return 0
    options.write.write_text(page(options.write.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
