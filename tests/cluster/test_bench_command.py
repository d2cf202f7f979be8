"""`tandem bench` finds the repository's benchmarks, hands flags on as they are, and says what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cluster
from cluster.cli import bench
from cluster.cli.parser import build_parser
from cluster.errors import ConfigError


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_flags_belong_to_the_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(bench, "load", lambda which: lambda arguments: given.append([which, *arguments]) or 7)
    options = build_parser().parse_args(["bench", name, "--json", "x.json", "--help", "-q", "word"])
    assert options.run(options) == 7
    assert given == [[name, "--json", "x.json", "--help", "-q", "word"]]


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_the_benchmarks_are_there(name: str) -> None:
    assert bench.load(name).__module__ == bench.BENCHMARKS[name][0]


def test_without_the_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "__file__", str(tmp_path / "cluster" / "__init__.py"))
    with pytest.raises(ConfigError, match="run this from a clone"):
        bench.load("transfer")


def test_a_missing_requirement_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.bench_transfer", None)
    with pytest.raises(ConfigError, match=r"bench_transfer.*pip install"):
        bench.load("transfer")
