"""The C twins' library: made once, found again, not made where it cannot be, and never taken from an open folder."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels._native import library, limits
from kernels.norm import rms_norm

WITHOUT_COMPILER = """
import shutil, torch
shutil.which = lambda name, *rest: None
from kernels import dispatch, norm
from kernels.errors import NativeUnavailable
rows, weight = torch.ones(2, 8), torch.ones(8)
print(norm.rms_norm(rows, weight, 0.0).tolist() == rows.tolist(), dispatch.has_native())
try:
    with dispatch.forced("native"):
        norm.rms_norm(rows, weight, 0.0)
except NativeUnavailable as error:
    print(error)
"""

QUICK = ("-O0", *library.FLAGS[1:])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder of its own, nothing remembered, and a compiler that need not optimise."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(library, "FLAGS", QUICK)
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


def test_without_a_compiler_ops_take_torch_and_asking_for_c_is_a_clear_error() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[0] == "True False", done.stderr
    assert "install gcc or clang" in done.stdout


def test_it_is_compiled_once_and_found_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.library()
    assert first is not None and first.parent == home / ".cache" / "tandem"
    assert first.parent.stat().st_mode & 0o077 == 0, "nobody else may put a library there"
    library.library.cache_clear()
    runs: list[list[str]] = []
    run = subprocess.run

    def recording(command: list[str], **options: object) -> object:
        runs.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", recording)
    assert library.library() == first
    assert [command[1:] for command in runs] == [["--version"]], "asked for its version, and not to compile"
    assert [path.name for path in first.parent.iterdir()] == [first.name], "no scratch is left"


def test_each_limit_stands_in_one_place() -> None:
    """The C files have none of their own: without the compiler's -D they do not compile."""

    def compiles(flags: tuple[str, ...]) -> bool:
        units = [str(library.SOURCES / name) for name in library.UNITS]
        command = ["cc", *flags, library.NO_THREADS, "-fsyntax-only", *units]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert compiles(library.FLAGS)
    for name in limits.IN_C:
        flags = tuple(flag for flag in library.FLAGS if not flag.startswith(f"-D{name}="))
        assert len(flags) == len(library.FLAGS) - 1
        assert not compiles(flags), name


def test_a_compiler_without_threads_serves_with_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "THREADS", "-fopenmp=there-is-none")
    made = library.library()
    assert made is not None and "there-is-none" in caplog.text
    assert "GOMP_parallel" not in made.read_bytes().decode("latin-1")


POOLS = """
from pathlib import Path
from kernels import dispatch
from kernels._native import library
assert dispatch.has_native()
library.functions("linear", library.POINTER)
lines = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in lines if "gomp" in line}))
"""


def test_there_is_one_pool_of_threads() -> None:
    """Torch's, and not a second one whose waiting threads would take the processors from it."""
    done = subprocess.run([sys.executable, "-c", POOLS], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr


def test_a_folder_that_others_may_write_to_is_not_used(home: Path) -> None:
    shared = home / ".cache" / "tandem"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    made = library.library()
    assert made is not None and made.parent != shared and not list(shared.iterdir())
    assert made.parent.stat().st_mode & 0o077 == 0


def test_sources_that_do_not_compile_are_a_warning_and_the_torch_path(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "--no-such-flag"))
    assert library.library() is None
    assert "could not be compiled" in caplog.text and "no-such-flag" in caplog.text


@pytest.mark.parametrize("damaged", [b"", b"no library"])
def test_a_damaged_library_is_made_again(home: Path, damaged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    script = f"from kernels._native import library; library.FLAGS = {QUICK}; print(library.library())"
    made = Path(_printed(script, home))  # by another process: here nothing is loaded
    made.write_bytes(damaged)
    assert library.library() == made
    assert made.stat().st_size > 1000
    assert not [record for record in caplog.records if record.name.startswith("kernels")]


def test_a_cache_that_cannot_be_written_to_is_done_without(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tempfile.mkstemp

    def refusing(**options: Any) -> tuple[int, str]:
        if Path(options["dir"]).is_relative_to(home):
            raise OSError(errno.EROFS, "Read-only file system")
        return make(**options)

    monkeypatch.setattr(tempfile, "mkstemp", refusing)
    made = library.library()
    assert made is not None and not made.is_relative_to(home)


def test_a_cache_below_somebody_else_s_folder_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = Path.stat

    def foreign(path: Path, **options: Any) -> os.stat_result:
        found = find(path, **options)
        return os.stat_result((*found[:4], os.geteuid() + 1, *found[5:10])) if path == home / ".cache" else found

    monkeypatch.setattr(Path, "stat", foreign)
    made = library.library()
    assert made is not None and not made.is_relative_to(home)


def test_what_killed_compilers_left_is_removed(home: Path) -> None:
    cache = home / ".cache" / "tandem"
    cache.mkdir(mode=0o700, parents=True)
    old, new = cache / "scratch-old.so", cache / "scratch-new.so"
    for scratch in (old, new):
        scratch.touch()
    os.utime(old, (1e9, 1e9))
    made = library.library()
    assert made is not None and sorted(cache.iterdir()) == sorted([made, new]), "another process may be at the new one"


def _printed(script: str, home: Path) -> str:
    own = {**os.environ, "HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=own, check=True
    ).stdout.strip()


def test_what_trains_and_what_is_large_takes_torch() -> None:
    small, weight = torch.ones(2, 8), torch.ones(8)
    assert dispatch.native("norm", small) is not None
    assert dispatch.native("norm", torch.ones(1 + dispatch.NATIVE_NUMBERS // 8, 8)) is None
    assert dispatch.native("norm", small.double()) is None
    assert dispatch.native("norm", small.to("meta")) is None
    learned = torch.ones(2, 8, requires_grad=True)
    rms_norm(learned, weight, 1e-6).sum().backward()
    assert learned.grad is not None
    with torch.no_grad():
        assert dispatch.native("norm", learned) is not None
    with dispatch.forced("torch"):
        assert dispatch.native("norm", small) is None


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_images_have_a_compiler_and_are_run_where_its_work_may_be_executed(stage: str) -> None:
    stages: dict[str, str] = {}
    for part in re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        below, _, name = part.splitlines()[0].split()
        stages[name] = stages.get(below, "") + part
    assert re.search(r"apt-get install .*\bgcc libc6-dev\b", stages[stage])
    mounts = re.findall(r"--tmpfs (\S+)", (ROOT / "docs" / "operating.md").read_text(encoding="utf-8"))
    assert mounts and set(mounts) == {"/tmp:exec"}, "docker mounts noexec unless told otherwise"
