"""`tandem simulate transfer`: the transfer protocol under every fault, on a virtual clock, replayable by seed.

Each seed is a run of its own: hosts, streams, a network and what goes wrong. After every step the promises of the
protocol are checked. Exit code 1 when one was broken, or when some kind of fault never happened.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from cluster.progress import progress_bar
from transfer.simulation.faults import FAULT_KINDS
from transfer.simulation.runner import MIN_SEEDS_FOR_FIRINGS, Report, run_seed, run_seeds
from transfer.simulation.world import Result

EXAMPLES = """\
examples:
  tandem simulate transfer --seeds 10000          many runs, two at a time
  tandem simulate transfer --seed 4711            one run again; if it fails, the story of the stream
  tandem simulate transfer --seed 4711 --trace    everything that happens in it
"""
DEFAULT_SEEDS = 1000
STORY_LINES = 80  # of a failing stream, after many runs; the replay shows all


def count(text: str) -> int:
    """For argparse: an int above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above zero")
    return number


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser(
        "simulate",
        help="run the transfer protocol under simulated faults",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("transfer",), help="what to simulate")
    parser.add_argument(
        "--seeds", type=count, default=None, metavar="N", help=f"how many runs (default: {DEFAULT_SEEDS})"
    )
    parser.add_argument("--first-seed", type=int, default=None, metavar="INT", help="the first of them (default: 0)")
    parser.add_argument("--seed", type=int, default=None, metavar="INT", help="only this one")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--jobs", type=count, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0 when every promise was kept."""
    if options.trace and options.seed is None:
        raise ConfigError("--trace tells the story of one run: name it with --seed")
    if options.seed is not None and (options.seeds, options.first_seed) != (None, None):
        raise ConfigError("--seed is one run: leave out --seeds and --first-seed")
    _check_writable(options.json)
    started_s = time.monotonic()
    if options.seed is not None:
        report = _run_one(options.seed, options.trace)
    else:
        first_seed = options.first_seed or 0
        seeds = range(first_seed, first_seed + (options.seeds or DEFAULT_SEEDS))
        with progress_bar(len(seeds), sys.stderr.isatty(), "seeds") as advance:

            def on_done(num_seeds: int) -> None:
                for _ in range(num_seeds):
                    advance()

            report = run_seeds(seeds, num_jobs=options.jobs, on_done=on_done)
        _print_report(report)
    if options.json is not None:
        options.json.write_text(json.dumps(_figures(report, time.monotonic() - started_s), indent=2) + "\n")
    return 1 if report.failures or report.silent_kinds else 0


def _check_writable(path: Path | None) -> None:
    """Before a long run, not after it."""
    if path is not None:
        try:
            path.open("a").close()
        except OSError as error:
            raise ConfigError(f"--json {path} cannot be written: {error.strerror}") from error


def _run_one(seed: int, is_traced: bool) -> Report:
    result = run_seed(seed, is_told=True)
    if is_traced:
        _print_story(result, None)
    if result.breach is not None:
        print(f"\nthe story of stream {result.breach.number}:" if result.breach.number is not None else "\nthe story:")
        _print_story(result, result.breach.number)
        print(f"\n{result.breach}\n{replay_command(seed)}")
    else:
        figures = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result.counts.items())
        faults = ", ".join(f"{kind} {times}" for kind, times in sorted(result.fired.items()) if times)
        print(f"seed {seed}: every promise kept ({figures}); faults: {faults or 'none'}")
    report = Report()
    report.add_result(result)
    return report


def _print_story(result: Result, number: int | None, last: int | None = None) -> None:
    lines = list(result.story.lines(number))
    for line in lines if last is None else lines[-last:]:
        print(line)


def _print_report(report: Report) -> None:
    console = Console()
    table = Table("fault", "fired", title=f"{report.num_seeds} seeds")
    for kind in FAULT_KINDS:
        fired = report.fired[kind]
        table.add_row(kind, str(fired), style=None if fired else "red")
    console.print(table)
    console.print(", ".join(f"{number} {name.replace('_', ' ')}" for name, number in report.counts.items()))
    if report.silent_kinds:
        console.print(f"[red]never fired in {report.num_seeds} seeds: {', '.join(report.silent_kinds)}[/]")
    for seed, text in report.failures:
        console.print(f"seed {seed}: {text}\n  {replay_command(seed)}", style="red", highlight=False, markup=False)
    if report.failures:
        result = run_seed(report.failures[0][0], is_told=True)
        number = None if result.breach is None else result.breach.number
        print(f"\nthe last {STORY_LINES} events of the first failing stream (seed {result.seed}):")
        _print_story(result, number, STORY_LINES)
    else:
        console.print(f"every promise kept in {report.num_seeds} seeds")


def replay_command(seed: int) -> str:
    """What to type to see a run again."""
    return f"replay: tandem simulate transfer --seed {seed} --trace"


def _figures(report: Report, seconds: float) -> dict[str, Any]:
    return {
        "target": "transfer",
        "num_seeds": report.num_seeds,
        "seconds": round(seconds, 1),
        "failures": [{"seed": seed, "breach": text, "replay": replay_command(seed)} for seed, text in report.failures],
        "fired": {kind: report.fired[kind] for kind in FAULT_KINDS},
        "never_fired": report.silent_kinds,
        "min_seeds_for_firings": MIN_SEEDS_FOR_FIRINGS,
        "counts": dict(report.counts),
    }
