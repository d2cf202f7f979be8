"""What tests wait with: it looks at once, and once more when its time is over."""

from types import SimpleNamespace

import pytest

from tests import waiting


def test_it_looks_once_more_after_its_last_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 99.0])
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: next(times)))
    answers = iter([0, 7])
    assert waiting.eventually(lambda: next(answers), "nothing", timeout_s=1.0) == 7


def test_it_looks_though_there_is_no_time() -> None:
    assert waiting.eventually(lambda: "here", "nothing", timeout_s=0.0) == "here"
    with pytest.raises(AssertionError, match="0 s later there was still: nothing"):
        waiting.eventually(lambda: None, "nothing", timeout_s=0.0)
