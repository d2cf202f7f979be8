"""What a run shows on the terminal: a bar with the time left, mean figures now and then, and notes as they come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REPORT_EVERY = 100


@contextmanager
def progress_bar(console: Console, name: str, steps: int, every: int = REPORT_EVERY) -> Iterator[ProgressReport]:
    """A bar over `steps`, shown while the context is entered."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield ProgressReport(bar, name, steps, every)


class ProgressReport:
    """Moves the bar each step; prints the means of the figures every `every` steps."""

    def __init__(self, bar: Progress, name: str, steps: int, every: int) -> None:
        self._bar, self._name, self._steps, self._every = bar, name, steps, every
        self._task = bar.add_task(name, total=steps, figures="")
        self._seen: defaultdict[str, list[float]] = defaultdict(list)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._seen[key].append(value)
        if step % self._every == 0 or step == self._steps:
            text = " ".join(f"{key} {sum(values) / len(values):.4f}" for key, values in self._seen.items())
            self._bar.console.print(f"{self._name} {step}/{self._steps}: {text}")
            self._bar.update(self._task, figures=text)
            self._seen.clear()
        self._bar.update(self._task, completed=step)

    def note(self, text: str) -> None:
        self._bar.console.print(text)
