"""`ray job submit --working-dir . -- python -m cluster demo` against a head started by hand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cluster.demo import questions
from tests.e2e.checkout import copy_tree
from tests.e2e.ray_head import RayHead

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
MARKER = """
import os, pathlib, sys
pathlib.Path({folder!r}, str(os.getpid())).write_text(f"{{sys.argv[0]}}\\n{{__file__}}")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the tracked tree with what a real one has beside it, and whose code writes where it runs."""
    folder, places = tmp_path / "checkout", tmp_path / "places"
    places.mkdir()
    copy_tree(folder)
    for big in (".venv/lib/big.so", ".mypy_cache/big.json"):  # beyond Ray's cap, if it were uploaded
        (folder / big).parent.mkdir(parents=True)
        with open(folder / big, "wb") as file:
            file.truncate(600 * 1024 * 1024)
    with open(folder / "cluster" / "actors.py", "a") as file:
        file.write(MARKER.format(folder=str(places)))
    return folder


def test_the_demo_runs_as_a_job(guarded_head: RayHead, checkout: Path, tmp_path: Path) -> None:
    result = guarded_head.submit("python", "-m", "cluster", "demo", cwd=checkout)
    log = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert result.returncode == 0, log + result.stderr
    count = len(questions())
    assert f"{count} of {count} answers are right" in log
    for question in questions():
        assert re.search(rf"{question.image.name} {re.escape(question.text)} {question.answer} right", log), log
    assert "connecting to Ray at" in log, "the job must join the cluster it was submitted to"
    # the job and its actors run what was uploaded, not what happens to be installed
    places = [file.read_text().split("\n") for file in (tmp_path / "places").iterdir()]
    assert {Path(program).name for program, _ in places} == {"__main__.py", "default_worker.py"}, places
    assert all("/working_dir_files/_ray_pkg_" in path for _, path in places), places


def test_the_weights_are_not_ignored() -> None:
    """What Ray leaves behind is listed in .gitignore and .rayignore; the shipped model must be in neither."""
    result = subprocess.run(
        ["git", "check-ignore", "--no-index", "-v", "cluster/demo/model/model.safetensors"],
        cwd=ROOT,
        capture_output=True,
    )
    assert result.returncode == 1, result.stdout
    assert not any("model" in line or "safetensors" in line for line in (ROOT / ".rayignore").read_text().splitlines())
