"""The C twins as a shared library: compiled by the machine's own C compiler at first use, for its own processor.

The result is kept in the user's cache folder under a name that says from which sources, compiler and processor it was
made; a folder that others may write to is not trusted, and without one each process compiles for itself. Where there
is no compiler, or it fails, there is no library, and the ops take their torch path.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels._native.limits import IN_C, SHARED_NUMBERS

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
HEADERS = ("common.h", "formats.h", "ops.h", "columns.h", "sharing.h")
UNITS = ("pointwise.c", "attention.c", "linear.c", "quantised_linear.c", "scan.c", "sharing.c", "decoder_layers.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    *(f"-D{name}={number}" for name, number in IN_C.items()),
)  # fmt: skip
WIDE_FLAGS = ("-mprefer-vector-width=512",)  # where the processor has such registers
THREADS, NO_THREADS = "-fopenmp", "-fopenmp-simd"  # the first with torch's own pool, which is loaded by then
COMPILE_TIMEOUT_S = 120
SCRATCH = "scratch-"  # what is being compiled


@functools.cache
def library() -> Path | None:
    """The library's file, None where it cannot be made."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        logger.info("no C compiler is installed: on the CPU small steps take torch's operations, which is slower")
        return None
    for threads in (THREADS, NO_THREADS):
        try:
            return _built(compiler, threads)
        except (OSError, subprocess.SubprocessError) as error:
            details = getattr(error, "stderr", None) or error
            logger.warning(
                "the C twins could not be compiled by %s %s and loaded, small steps will be slower: %s",
                compiler,
                threads,
                details,
            )
    return None


def _built(compiler: str, threads: str) -> Path:
    """The library's file in the cache, or in a folder of this process where the cache does not serve."""
    flags = [*FLAGS, threads, *(WIDE_FLAGS if "avx512f" in _processor() else ())]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S).stdout
    digest = hashlib.blake2b(repr((compiler, version, flags, _processor())).encode(), digest_size=16)
    for name in (*HEADERS, *UNITS):
        digest.update((SOURCES / name).read_bytes())
    command = [compiler, *flags, *(str(SOURCES / name) for name in UNITS)]
    name = f"native-{digest.hexdigest()}.so"
    cache = _cache_folder()
    if cache is not None:
        try:
            return _made(cache / name, command)
        except OSError as error:
            logger.info("%s does not serve as a cache, each process compiles for itself: %s", cache, error)
    return _made(Path(_own_folder().name) / name, command)


def _made(target: Path, command: list[str]) -> Path:
    """`target`, compiled unless it is there and can be loaded. Raises OSError where it can be neither."""
    if target.is_file():
        try:
            ctypes.CDLL(str(target))
            return target
        except OSError as error:
            logger.info("%s is made again: %s", target, error)
            target.unlink(missing_ok=True)
    _remove_old_scratch(target.parent)
    handle, scratch = tempfile.mkstemp(prefix=SCRATCH, suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [*command, "-o", scratch, "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_TIMEOUT_S)
        Path(scratch).replace(target)  # at once: another process may be looking
    finally:
        Path(scratch).unlink(missing_ok=True)
    ctypes.CDLL(str(target))
    return target


def _remove_old_scratch(folder: Path) -> None:
    """What compilers left that were killed: none that may still run is as old."""
    for path in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 2 * COMPILE_TIMEOUT_S:
                path.unlink()


def _cache_folder() -> Path | None:
    """A folder in the user's cache that nobody else can write to or put another in the place of, None without one."""
    try:
        folder = Path.home() / ".cache" / "tandem"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found, above = folder.stat(), folder.parent.stat()
    except (OSError, RuntimeError):
        return None
    is_private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_kept = above.st_uid in (os.geteuid(), 0) and not above.st_mode & stat.S_IWOTH
    return folder if is_private and is_kept else None


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="tandem-native-")


@functools.cache
def _processor() -> str:
    """What decides which instructions the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


POINTER, SIZE, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Function = Callable[..., Any]


def functions(
    name: str, *arguments: type, returns: type | None = None, takes_long: bool = False
) -> dict[torch.dtype, Function]:
    """The C function `name` for each dtype that it has. takes_long: it lets other Python threads run meanwhile, which
    one of a few microseconds had better not: getting the interpreter lock back may take longer than that."""
    path = library()
    assert path is not None, "dispatch asks first"
    loaded = ctypes.CDLL(str(path)) if takes_long else ctypes.PyDLL(str(path))
    found = {}
    for dtype, suffix in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        function = getattr(loaded, f"{name}_{suffix}", None)
        if function is not None:
            function.argtypes, function.restype = arguments, returns
            found[dtype] = function
    return found


def row_function(name: str, *arguments: type) -> Function:
    """The C function `name`, which takes a number of threads behind these arguments. To be called with a dtype, how
    many numbers a tensor holds, and the arguments; many are shared out among torch's threads, and do not hold up other
    threads of Python."""
    short, long = functions(name, *arguments, SIZE), functions(name, *arguments, SIZE, takes_long=True)

    def call(dtype: torch.dtype, numbers: int, *given: Any) -> None:
        if numbers > SHARED_NUMBERS:
            long[dtype](*given, torch.get_num_threads())
        else:
            short[dtype](*given, 1)

    return call
