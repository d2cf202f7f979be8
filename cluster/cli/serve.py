"""`tandem serve`: a cluster that serves one model until it is told to stop."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from cluster.cli.flags import MODEL_FLAGS, SERVE_FLAGS, add_flags, add_key_flags, config_from
from cluster.cli.signals import StopSignal


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
    """0 when it was told to stop: after draining, or by SIGTERM while it was still starting; 130 by Ctrl-C then."""
    stop = StopSignal()
    try:
        _serve(options, stop)
        return 0
    except KeyboardInterrupt:
        pass
    # Only here, without the frames that were interrupted, is all that they held sure to be put back: stderr too.
    _say("stopped before it was ready")
    return 0 if stop.number == signal.SIGTERM else stop.exit_code


def _serve(options: argparse.Namespace, stop: StopSignal) -> None:
    from cluster.launch import RayCluster  # here, so that the other commands run where Ray is not installed

    config = config_from(options)
    with RayCluster(config, ray_address=options.ray_address, log_level=options.log_level, on_status=_say) as cluster:
        stop.expect()
        _say(f"ready: {cluster.url}/v1/chat/completions (Ctrl-C drains and stops)")
        stop.wait()
        _say("draining")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
