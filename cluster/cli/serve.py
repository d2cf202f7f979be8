"""`tandem serve`: a cluster that serves one model until it is told to stop."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from typing import Any

from cluster.cli.flags import MODEL_FLAGS, SERVE_FLAGS, add_flags, add_key_flags, config_from
from cluster.launch import RayCluster


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser("serve", help="serve a model behind an OpenAI-compatible API", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument("--config", metavar="FILE", help="YAML; flags override it")
    parser.add_argument(
        "--ray-address", default=ray_address, metavar="ADDRESS", help="join this Ray (default: start one)"
    )
    add_flags(parser, SERVE_FLAGS)
    add_flags(parser, MODEL_FLAGS)
    add_key_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    config = config_from(options)
    stop = threading.Event()
    _stop_on_signals(stop)
    with RayCluster(config, ray_address=options.ray_address, log_level=options.log_level, on_status=_say) as cluster:
        _stop_on_signals(stop)  # again: Ray has put its own SIGTERM handler in place of ours
        if not stop.is_set():
            _say(f"ready: {cluster.url}/v1/chat/completions (Ctrl-C drains and stops)")
        stop.wait()
        _say("draining")
    return 0


def _stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
