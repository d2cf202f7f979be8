"""The argument parser: every command, and the flags they share."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.cli import bench, chaos, demo, doctor, generate, serve, simulate


def build_parser(*, ray_address: str | None = None) -> argparse.ArgumentParser:
    """ray_address: what --ray-address defaults to."""
    parser = argparse.ArgumentParser(
        prog="tandem", description="Serve multimodal models from a cluster whose two halves scale apart."
    )
    parser.add_argument(
        "--log-level", default="WARNING", metavar="LEVEL", help="DEBUG, INFO, WARNING (default) or ERROR"
    )
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (serve, demo, generate, doctor, chaos, simulate, bench):
        command.add_to(commands, ray_address)
    return parser
