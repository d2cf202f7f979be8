"""`tandem bench`: benchmarks, which the repository has and the installed package has not. Their flags are theirs."""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import cluster
from cluster.errors import ConfigError

BENCHMARKS: dict[str, tuple[str, str]] = {
    "transfer": ("benchmarks.bench_transfer", "the wire against raw TCP and memcpy, between two processes"),
    "decode": ("benchmarks.bench_decode", "decoding, alone and in a crowd, against transformers on the CPU"),
    "arrivals": ("benchmarks.bench_arrivals", "mixed lengths that arrive at random, against static batches"),
    "overlap": ("benchmarks.bench_overlap", "prefill on the arrived prefix: how much of a slow transfer it hides"),
    "quantised": ("benchmarks.bench_quantised", "weights in 8 and 4 bits: bytes, speed, and what answers lose"),
    "diffusion": ("benchmarks.bench_diffusion", "filling in masks, against the published loop on the CPU"),
    "serve": ("benchmarks.bench_serving", "serving against transformers on the CPU"),
    "split": ("benchmarks.bench_split", "prefill and decode apart against together: first token, bytes of KV"),
    "kernels": ("benchmarks.gpu.__main__", "every kernel on this machine's GPU, after the kernel tests there"),
}


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser("bench", help="measure this machine (needs the repository)", description=__doc__)
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (_, text) in BENCHMARKS.items():
        # no character starts a flag here: all of them, --help too, are the benchmark's own
        kind = kinds.add_parser(name, help=f"{text}; `tandem bench {name} --help`", prefix_chars="\0", add_help=False)
        kind.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return load(options.benchmark)(options.arguments)


def load(name: str) -> Callable[[Sequence[str]], int]:
    """The main function of a benchmark. ConfigError where it, or what it needs, is not there."""
    root = Path(cluster.__file__).resolve().parents[1]
    if not (root / "benchmarks").is_dir():
        raise ConfigError(
            f"there are no benchmarks beside {root / 'cluster'}: run this from a clone of the repository, "
            "installed with pip install --editable '.[dev]'"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return cast(Callable[[Sequence[str]], int], pkgutil.resolve_name(f"{BENCHMARKS[name][0]}:main"))
    except ImportError as error:
        raise ConfigError(f"the benchmark cannot be loaded ({error}): pip install --editable '.[dev]'") from error
