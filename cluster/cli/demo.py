"""`tandem demo`: a local cluster on the shipped model answers questions about the shipped images, hop by hop."""

from __future__ import annotations

import argparse
import base64
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.cli import demo_diffusion
from cluster.cli.flags import MODEL_FLAGS, SERVE_FLAGS, add_flags, config_from
from cluster.cli.signals import StopSignal
from cluster.demo import MODEL_DIR, MODEL_NAME, Question, questions
from cluster.errors import ClusterError

REQUEST_TIMEOUT_S = 60.0
# figures of each answer's hops -> how they are called here
COLUMNS = {"rows": "rows", "blocks": "blocks", "bytes": "bytes", "grant_rounds": "grant\nrounds"}
SPLIT_COLUMNS = {"rows": "rows", "prefill_ms": "prefill\nms", "kv_blocks": "KV\nblocks", "kv_bytes": "KV\nbytes"}


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser("demo", help="see the whole path at work on the shipped model", description=__doc__)
    parser.add_argument(
        "--diffusion", action="store_true", help="the model that fills in masks, live, without a cluster"
    )
    parser.add_argument("--keep", action="store_true", help="go on serving afterwards")
    parser.add_argument("--split", action="store_true", help="compute prompts and answers on workers of their own")
    parser.add_argument(
        "--ray-address", default=ray_address, metavar="ADDRESS", help="join this Ray (default: start one)"
    )
    add_flags(parser, SERVE_FLAGS)
    add_flags(parser, MODEL_FLAGS)
    parser.set_defaults(run=run)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One streamed answer and what it took. Times in milliseconds, seen from the client."""

    text: str
    ttft_ms: float
    total_ms: float
    usage: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """Of the whole answer, from the request to its end."""
        return float(self.usage["completion_tokens"]) / self.total_ms * 1e3


def run(options: argparse.Namespace) -> int:
    """0 when every answer is right; 130 or 143 when a signal ended it early."""
    if options.diffusion:
        return demo_diffusion.run(options)
    stop = StopSignal()
    try:
        return _run(options, stop)
    except KeyboardInterrupt:
        return stop.exit_code


def _run(options: argparse.Namespace, stop: StopSignal) -> int:
    from cluster.launch import RayCluster  # here, so that the other commands run where Ray is not installed

    console = Console()
    fixed: dict[str, Any] = {"model__path": str(MODEL_DIR)}
    if not options.served_model_name:
        fixed["model__served_model_name"] = MODEL_NAME
    if options.split:
        fixed |= {"workers__prefill": options.prefill_workers or 1, "workers__decode": options.decode_workers or 1}
    if options.port is None and not options.keep:
        fixed["gateway__port"] = 0
    config = config_from(options, **fixed)
    with RayCluster(
        config, ray_address=options.ray_address, log_level=options.log_level, on_status=console.print
    ) as cluster:
        replies = _ask_all(cluster.url, config.model.served_model_name, console)
        console.print(_table(replies))
        num_right = sum(reply.text == question.answer for question, reply in replies)
        console.print(f"{num_right} of {len(replies)} answers are right")
        if options.keep:
            stop.expect()
            console.print(f"still serving at {cluster.url} (Ctrl-C stops)")
            stop.wait()
    return 0 if num_right == len(replies) else 1


def _ask_all(url: str, model: str, console: Console) -> list[tuple[Question, Reply]]:
    replies = []
    with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
        for question in questions():
            console.print(f"[bold]{question.image.name}[/bold] {question.text} ", end="")
            reply = _ask(client, model, question, console)
            console.print(
                "[green]right[/green]" if reply.text == question.answer else f"[red]not {question.answer}[/red]"
            )
            replies.append((question, reply))
    return replies


def _ask(client: httpx.Client, model: str, question: Question, console: Console) -> Reply:
    image = base64.b64encode(question.image.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": question.text},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 16,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, ttft_ms = "", 0.0
    usage: dict[str, Any] = {}
    started_s = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ClusterError(f"the gateway answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ClusterError(f"the answer broke off: {event['error']['message']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                delta = choice["delta"].get("content") or ""
                if delta and not text:
                    ttft_ms = (time.perf_counter() - started_s) * 1e3
                text += delta
                console.print(delta, end="", style="cyan", highlight=False)
    console.print(" ", end="")
    return Reply(text=text, ttft_ms=ttft_ms, total_ms=(time.perf_counter() - started_s) * 1e3, usage=usage)


def _table(replies: list[tuple[Question, Reply]]) -> Table:
    is_split = any("kv_bytes" in reply.usage.get("hops", {}) for _, reply in replies)
    columns = SPLIT_COLUMNS if is_split else COLUMNS
    table = Table(title="What each hop did", box=box.SIMPLE_HEAD, padding=(0, 0), min_width=72)
    table.add_column("image", no_wrap=True)
    for name in ("encode\nms", *columns.values(), "first token\nms", "tokens", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for question, reply in replies:
        hops = reply.usage.get("hops", {})
        encode = "cached" if hops.get("cache_hits") else f"{hops['encode_ms']:.1f}" if "encode_ms" in hops else "-"
        figures = [hops.get(name, "-") for name in columns]
        table.add_row(
            question.image.name,
            encode,
            *(f"{figure:.1f}" if isinstance(figure, float) else str(figure) for figure in figures),
            f"{reply.ttft_ms:.1f}",
            str(reply.usage["completion_tokens"]),
            f"{reply.tokens_per_s:.0f}",
        )
    return table
