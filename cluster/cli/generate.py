"""`tandem generate`: one answer on the terminal, from both halves in this process."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from cluster.cli.flags import MODEL_FLAGS, add_flags, config_from
from cluster.llm import LLM
from language_worker.diffusion_params import DiffusionParams
from language_worker.errors import InvalidRequest
from language_worker.sampling_params import SamplingParams


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser("generate", help="answer one prompt, without a cluster", description=__doc__)
    parser.add_argument("--model", metavar="DIR", required=True, help="a Hugging Face checkpoint folder")
    parser.add_argument("--config", metavar="FILE", help="YAML; flags override it")
    parser.add_argument("--prompt", required=True, help="the user's text ('-': read it from standard input)")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image before the text (repeatable)"
    )
    parser.add_argument("--raw", action="store_true", help="complete the text as it is, without the chat template")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="INT")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="FLOAT", help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="FLOAT")
    parser.add_argument("--seed", type=int, default=None, metavar="INT")
    parser.add_argument(
        "--diffusion",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of DiffusionParams, for models that fill in masks (repeatable): schedule=static",
    )
    add_flags(parser, MODEL_FLAGS)
    parser.set_defaults(run=run)


def diffusion_from(settings: Sequence[str]) -> DiffusionParams | None:
    """From NAME=VALUE settings; values are read as JSON where they are. Raises InvalidRequest; None for none."""
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InvalidRequest(f"--diffusion {setting}: write NAME=VALUE")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return DiffusionParams.from_body(fields) if fields else None


def run(options: argparse.Namespace) -> int:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt: Any = {"prompt": text, "images": options.image}
    if not options.raw:
        images = [{"type": "image", "image": path} for path in options.image]
        prompt = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        diffusion=diffusion_from(options.diffusion),
    )
    with LLM.from_config(config_from(options)) as llm:
        for chunk in llm.stream(prompt, params):
            print(chunk.text, end="", flush=True)
    print()
    return 0
