"""`tandem doctor`: checks this machine, the installed versions, a port and a model folder, and says what to do.

It takes the configuration and flags of `tandem serve`, changes nothing, starts nothing and loads no weights. Each check
is a function that gives a `Finding` and never raises; what `pyproject.toml` requires is read from the installed
package, so there is no second list here to keep.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from cluster.cli.flags import MODEL_FLAGS, SERVE_FLAGS, add_flags, read_config
from cluster.config import ClusterConfig
from cluster.demo import MODEL_DIR
from cluster.errors import ClusterError
from cluster.model_info import ModelInfo, has_vision
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedError
from embedding_worker.runner import VisionRunner
from kernels.dispatch import has_native
from kernels.machine import GIB, memory_bytes, num_cpus
from language_worker.engine_builder import check_model
from language_worker.errors import EngineError
from language_worker.nanochat_files import choose_folder
from transfer.checkpoint import Checkpoint
from transfer.errors import TransferError

DISTRIBUTION = "tandem-serve"
MAX_SOCKET_PATH_CHARS = 107  # of a Unix socket, on Linux
SOCKET_NAME_CHARS = 48  # what a cluster adds to the folder of temporary files: its own folder, and a worker's socket
MIN_SHARED_MEMORY_BYTES = 64 * 1024 * 1024

Verdict = Literal["ok", "note", "bad"]
STYLES: dict[Verdict, str] = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check. advice: what to do, for a note or a failure."""

    verdict: Verdict
    what: str
    advice: str = ""


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser("doctor", help="check machine, versions, port and model folder", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: the demo's)")
    parser.add_argument("--config", metavar="FILE", help="YAML, as for serve; flags override it")
    add_flags(parser, SERVE_FLAGS)
    add_flags(parser, MODEL_FLAGS)
    parser.set_defaults(run=run, ray_address=ray_address)


def run(options: argparse.Namespace) -> int:
    """0 unless something is bad."""
    console = Console()
    is_bad = False
    config = read_config(options)
    if not config.model.path:
        config = replace(config, model=replace(config.model, path=str(MODEL_DIR)))
    for finding in findings(config):
        is_bad |= finding.verdict == "bad"
        verdict = f"[{STYLES[finding.verdict]}]{finding.verdict:>4}[/]"
        console.print(f"{verdict}  {escape(finding.what)}", highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"      -> {escape(finding.advice)}", highlight=False, soft_wrap=True)
    console.print("something must be repaired first" if is_bad else "ready to serve")
    return 1 if is_bad else 0


def findings(config: ClusterConfig) -> Iterator[Finding]:
    """Every check in order, of what this configuration would serve; none raises. config: not resolved."""
    yield _python()
    yield from _packages()
    yield _machine()
    yield _accelerator()
    yield _compiler()
    yield _shared_memory()
    yield _temporary_folder()
    yield _port(config.gateway.host, config.gateway.port)
    yield from _model(config)


def _python() -> Finding:
    what = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(verdict="ok", what=what)


def _packages() -> Iterator[Finding]:
    """One finding for each package that is required, in the versions that are."""
    advice = "run `pip install -c constraints.txt -e .`"
    try:
        required = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        yield Finding(verdict="bad", what=f"{DISTRIBUTION} is not installed", advice=advice)
        return
    for requirement in required:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, advice)


def _package(requirement: Requirement, advice: str) -> Finding:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(verdict="bad", what=f"{requirement.name} is not installed", advice=advice)
    what = f"{requirement.name} {version}"
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(verdict="bad", what=f"{what}, but {requirement.specifier} is required", advice=advice)
    return Finding(verdict="ok", what=what)


def _machine() -> Finding:
    num_bytes = memory_bytes(torch.device("cpu"))
    what = f"{num_cpus()} CPUs, {num_bytes / GIB:.0f} GiB of memory"
    if num_bytes < 4 * GIB:
        return Finding(verdict="note", what=what, advice="Ray and three processes need about 2.5 GiB before any model")
    return Finding(verdict="ok", what=what)


def _accelerator() -> Finding:
    if not torch.cuda.is_available():
        return Finding(
            verdict="note", what="no CUDA device", advice="models run on the CPU; see README for GPU builds of torch"
        )
    if importlib.util.find_spec("triton") is None:
        return Finding(
            verdict="note", what="CUDA without triton", advice="install the gpu extra: pip install -e '.[gpu]'"
        )
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Finding(verdict="ok", what=f"CUDA {torch.version.cuda}: {names}")


def _compiler() -> Finding:
    if has_native():
        return Finding(verdict="ok", what="a C compiler: small models decode quickly on the CPU")
    return Finding(
        verdict="note",
        what="no C compiler that works",
        advice="install gcc or clang: without one small models decode about half as fast on the CPU",
    )


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding(verdict="note", what="no /dev/shm", advice="Ray falls back to disk; mount a tmpfs there")
    free = shutil.disk_usage("/dev/shm").free
    if free < MIN_SHARED_MEMORY_BYTES:
        return Finding(
            verdict="bad", what=f"/dev/shm has {free >> 20} MiB free", advice="Ray needs more: docker run --shm-size=1g"
        )
    return Finding(verdict="ok", what=f"/dev/shm has {free / GIB:.1f} GiB free")


def _temporary_folder() -> Finding:
    folder = tempfile.gettempdir()
    what = f"sockets and temporary files lie in {folder}"
    if len(os.fsencode(folder)) + SOCKET_NAME_CHARS > MAX_SOCKET_PATH_CHARS:
        limit = MAX_SOCKET_PATH_CHARS - SOCKET_NAME_CHARS
        return Finding(verdict="bad", what=f"{what}: too long", advice=f"set TMPDIR to a path of {limit} bytes at most")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(verdict="bad", what=f"{what}: not writable", advice="set TMPDIR to a folder of your own")
    return Finding(verdict="ok", what=what)


def _port(host: str, port: int) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding(
                verdict="bad",
                what=f"cannot listen on {host}:{port}: {error.strerror or error}",
                advice="use another --port",
            )
    return Finding(verdict="ok", what=f"{host}:{port} is free")


def _model(config: ClusterConfig) -> Iterator[Finding]:
    """Both halves find all they need: names and shapes from the headers, no weights are loaded."""
    path = str(choose_folder(Path(config.model.path).expanduser()))
    opened = _checked(
        f"{path}: weights",
        lambda: f"{len(Checkpoint.open(path).tensors)} tensors, all shards present",
        "give the folder with config.json, the *.safetensors and, if there are several, their index; or copy it again",
    )
    yield opened
    yield _checked(
        f"{path}: tokenizer and chat template",
        lambda: _described(ModelInfo.load(path, config.config_overrides())),
        "copy tokenizer.json and tokenizer_config.json from where the model comes from",
    )
    if opened.verdict == "bad":
        return
    try:
        served = config.resolve()
    except (ClusterError, EngineError, TransferError) as error:
        yield Finding(verdict="bad", what=f"configuration: {error}", advice="change the file or the flags that say so")
        return
    halves: tuple[tuple[str, Callable[[], str], str], ...] = (
        ("language half", lambda: _complete(check_model(path, served.language)), ""),
        ("vision half", lambda: _vision(path, served.embedding), ", preprocessor_config.json"),
    )
    for name, check, also in halves:
        advice = f"take config.json{also} and the *.safetensors from one and the same published model"
        yield _checked(f"{path}: {name}", check, advice)


def _vision(path: str, config: EmbedConfig) -> str:
    if not has_vision(path, config.config_overrides):
        return "none, the model takes text only"
    return _complete(VisionRunner.check(path, config))


def _complete(num_tensors: int) -> str:
    return f"{num_tensors} tensors, all that config.json asks for"


def _described(info: ModelInfo) -> str:
    template = "with a chat template" if info.chat_template else "no chat template: /v1/completions only"
    return f"{info.tokenizer.vocab_size} token ids, {template}"


def _checked(name: str, check: Callable[[], str], advice: str) -> Finding:
    """What `check` says when it passes; every line of its error when it does not."""
    try:
        return Finding(verdict="ok", what=f"{name}: {check()}")
    except (ClusterError, EmbedError, EngineError, TransferError, OSError) as error:
        return Finding(verdict="bad", what=f"{name}: {error}", advice=advice)
