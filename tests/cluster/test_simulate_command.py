"""`tandem simulate transfer`: figures and exit codes, replay of one seed, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cluster.cli import simulate
from cluster.cli.parser import build_parser
from cluster.errors import ConfigError
from transfer.simulation.books import Breach
from transfer.simulation.runner import run_seed
from transfer.simulation.world import Result


def run(*arguments: str) -> int:
    options = build_parser().parse_args(["simulate", "transfer", *arguments])
    code: int = options.run(options)
    return code


def test_many_seeds_give_a_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "20", "--first-seed", "5", "--jobs", "1", "--json", str(tmp_path / "x.json")) == 0
    assert "every promise kept in 20 seeds" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["num_seeds"] == 20


def test_one_seed_is_replayed_and_told_to_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for _ in range(2):
        assert run("--seed", "11", "--trace") == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and "sends Open" in told[0] and "seed 11: every promise kept" in told[0]


def test_a_broken_promise_is_exit_code_1_with_its_story(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(seed: int, *, is_told: bool) -> Result:
        breach = Breach(promise="1: nothing is lost", text="planted", number=0, time_s=1.0)
        return dataclasses.replace(run_seed(seed, is_told=is_told), breach=breach)

    monkeypatch.setattr(simulate, "run_seed", broken)
    assert run("--seed", "11") == 1
    said = capsys.readouterr().out
    assert "the story of stream 0" in said and "planted" in said and "tandem simulate transfer --seed 11" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3", "--seeds", "9"], "leave out --seeds"),
        (["--trace"], "name it with --seed"),
        (["--seeds", "9", "--json", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_run(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "run_seeds", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_the_log_level_may_stand_on_either_side_of_the_command() -> None:
    parser = build_parser()
    assert parser.parse_args(["simulate", "transfer"]).log_level == "WARNING"
    assert parser.parse_args(["--log-level", "DEBUG", "simulate", "transfer"]).log_level == "DEBUG"
    assert parser.parse_args(["simulate", "transfer", "--log-level", "INFO"]).log_level == "INFO"
