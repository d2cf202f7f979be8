"""`tandem harness`: runs scenario files against a cluster that it brings up, or against one that runs already.

Every answer is checked; the exit code is 0 when every scenario passed, 1 when one did not, 2 when a file is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

EXAMPLES = """\
examples:
  tandem harness examples/harness/*.yaml --junit junit.xml --html report.html
      every scenario on a Ray of its own in this machine
  tandem harness smoke.yaml --url https://tandem.example.com --api-key-file key.txt
      the loads of a file against a deployment; what it expects of faults it cannot have
"""


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser(
        "harness",
        help="run scenarios of load, faults and upgrades, and check every answer",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="+", metavar="FILE", help="scenario files")
    parser.add_argument("--url", help="a deployment that runs, instead of each file's topology")
    parser.add_argument("--api-key-file", metavar="FILE", help="the deployment's key, in the first line")
    parser.add_argument("--ray-address", default=ray_address, metavar="ADDRESS", help="join this Ray")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML here")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots here")
    parser.add_argument("--json", metavar="FILE", help="write every figure here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cluster.harness.oracle import questions_of  # here, with all that needs Ray, for where it is not installed
    from cluster.harness.plan import load_scenario
    from cluster.harness.report import as_json, html, junit, summary
    from cluster.harness.run import run_scenario

    given = {"url": options.url} if options.url else {"ray_address": options.ray_address or ""}
    scenarios = []
    for path in options.scenarios:
        scenario = load_scenario(path)
        if scenario.oracle.kind == "file":
            questions_of(Path(scenario.oracle.file))  # now, and not when a cluster was started
        topology = scenario.topology.model_copy(update=given)
        scenarios.append(scenario.model_copy(update={"topology": topology}))
    results = []
    for scenario in scenarios:
        result = run_scenario(scenario, api_key=_key(options.api_key_file), on_status=_say)
        results.append(result)
        for step in result.steps:
            print(f"{'FAILED' if step.broken_rules else 'passed'}  {result.name}: {step.name}: {summary(step)}")
            for rule in step.broken_rules:
                print(f"        {rule}")
        if result.error:
            print(f"FAILED  {result.name}: {result.error}")
    if options.junit:
        _write(options.junit, junit(results))
    if options.html:
        _write(options.html, html(results))
    if options.json:
        _write(options.json, json.dumps(as_json(results), indent=1) + "\n")
    return 0 if all(result.has_passed for result in results) else 1


def _key(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").split("\n")[0].strip()
    except OSError as error:
        raise ConfigError(f"cannot read --api-key-file {path}: {error.strerror}") from error


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
