"""The protocol page holds what the tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from transfer.protocol import diagrams
from transfer.protocol.state import RECEIVER_TABLE, SENDER_TABLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


def test_the_page_is_what_the_tables_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert diagrams.page(text) == text, "run: python -m transfer.protocol.diagrams --write docs/protocol.md"


@pytest.mark.parametrize(("name", "moves"), [("sender", SENDER_TABLE), ("receiver", RECEIVER_TABLE)])
def test_every_move_is_in_the_table_and_all_but_failures_in_the_diagram(name: str, moves) -> None:  # type: ignore[no-untyped-def]
    head, _, *rows = diagrams.table(name).splitlines()
    events = [cell.strip(" ←") for cell in head.split("|")[2:-1]]
    shown = {}
    for row in rows:
        state, *cells = [cell.strip() for cell in row.split("|")[1:-1]]
        shown |= {(state, event): cell for event, cell in zip(events, cells, strict=True) if cell}
    assert shown == {(state.value, event.value): following.value for (state, event), following in moves.items()}
    drawn = set()
    for line in diagrams.diagram(name).splitlines():
        if ": " in line:
            arrow, _, labels = line.strip().partition(": ")
            start, _, end = arrow.partition(" --> ")
            drawn |= {(start, event, end) for event in labels.split(", ")}
    assert drawn == {(s.value, e.value, f.value) for (s, e), f in moves.items() if f.value != "failed"}


def test_a_stale_page_is_rewritten_and_one_without_markers_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("draining", "draning"), encoding="utf-8")
    assert diagrams.main(["--write", str(page)]) == 0
    assert "| draining |" in page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="generated: sender"):
        diagrams.page("nothing")
