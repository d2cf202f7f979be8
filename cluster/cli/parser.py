"""The argument parser: every command, and the flags they share."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.cli import bench, chaos, demo, doctor, generate, harness, serve, simulate, stop


def build_parser(*, ray_address: str | None = None) -> argparse.ArgumentParser:
    """ray_address: what --ray-address defaults to."""
    parser = argparse.ArgumentParser(
        prog="tandem", description="Serve multimodal models from a cluster whose two halves scale apart."
    )
    _add_log_level(parser, "WARNING")
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (serve, stop, demo, generate, doctor, harness, chaos, simulate, bench):
        command.add_to(commands, ray_address)
    for parser_of_command in commands.choices.values():
        _add_log_level(parser_of_command, argparse.SUPPRESS)  # what stands before the command counts, too
    return parser


def _add_log_level(parser: argparse.ArgumentParser, default: str) -> None:
    text = "DEBUG, INFO, WARNING (default) or ERROR"
    parser.add_argument("--log-level", default=default, metavar="LEVEL", help=text)
