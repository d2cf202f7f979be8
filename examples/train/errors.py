"""What can go wrong in a run.

TrainingError
    NonFiniteError     a loss, gradient or weight is not finite; says where that began
    ResumeError        a file is none that this run could go on from
"""

from __future__ import annotations


class TrainingError(Exception):
    """Root of this package's errors."""


class NonFiniteError(TrainingError):
    """A number is not finite; `place` is the module or parameter where that began."""

    def __init__(self, step: int, place: str, what: str) -> None:
        super().__init__(step, place, what)
        self.step, self.place, self.what = step, place, what

    def __str__(self) -> str:
        return f"step {self.step}: {self.what}"


class ResumeError(TrainingError):
    """The file belongs to another run, or is no state of a run."""
