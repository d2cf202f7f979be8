"""What the terminal shows of a run: means since the last line, the bar, notes."""

from __future__ import annotations

import io

from rich.console import Console

from examples.train.progress import progress_bar


def test_figures_are_means_since_the_last_line_and_notes_come_at_once() -> None:
    shown = io.StringIO()
    with progress_bar(Console(file=shown, width=200), "seeing", steps=5, every=2) as report:
        for step, loss in enumerate((4.0, 2.0, 1.0, 0.5, 8.0), start=1):
            report.figures(step, {} if step == 3 else {"loss": loss, "digit": 0.25})  # one step was taken back
            if step == 3:
                report.note("step 2: the loss is 9.0 times the recent median")
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert lines[:4] == [
        "seeing 2/5: loss 3.0000 digit 0.2500",
        "step 2: the loss is 9.0 times the recent median",
        "seeing 4/5: loss 0.5000 digit 0.2500",
        "seeing 5/5: loss 8.0000 digit 0.2500",
    ]
    assert "5/5" in lines[-1]
