"""`tandem demo --diffusion`: a model that fills in masks does sums, and its blocks fill in live on the terminal.

One process, no Ray: what is shown is the decoding. Dots are masks; a table at the end says what each answer took.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.flags import config_from
from cluster.demo import DIFFUSION_MODEL_DIR, SUMS, answer_to_sums
from cluster.llm import LLM
from language_worker.api import SamplingParams
from language_worker.diffusion_params import DiffusionParams
from language_worker.tokenizer import Tokenizer

MASK_SIGN, END_SIGN = "·", " "
FRAME_S = 0.15  # a step takes a few milliseconds, which nobody would see
PARAMS = SamplingParams(max_tokens=32, temperature=0.0, diffusion=DiffusionParams(block_length=16, show_steps=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One answer and what it took."""

    text: str
    num_steps: int
    num_tokens: int


def run(options: argparse.Namespace) -> int:
    """0 when every answer is right."""
    console = Console()
    with LLM.from_config(config_from(options, model__path=str(DIFFUSION_MODEL_DIR))) as llm:
        replies = [(question, _ask(llm, question, console)) for question in SUMS]
    console.print(_table(replies))
    num_right = sum(reply.text == answer_to_sums(question) for question, reply in replies)
    console.print(f"{num_right} of {len(replies)} answers are right")
    return 0 if num_right == len(replies) else 1


def _ask(llm: LLM, question: str, console: Console) -> Reply:
    tokenizer = Tokenizer(DIFFUSION_MODEL_DIR)
    text, num_steps, num_tokens = "", 0, 0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for chunk in llm.stream([{"role": "user", "content": question}], PARAMS):
            text += chunk.text
            num_tokens += len(chunk.token_ids)
            if chunk.preview is not None and console.is_terminal:
                block = "".join(MASK_SIGN if token is None else _sign(tokenizer, token) for token in chunk.preview)
                live.update(_line(question, text, (block, "yellow")), refresh=True)
                time.sleep(FRAME_S)
            num_steps += chunk.preview is not None
    is_right = text == answer_to_sums(question)
    console.print(_line(question, text, (" right", "green") if is_right else (" wrong", "red")))
    return Reply(text=text, num_steps=num_steps, num_tokens=num_tokens)


def _sign(tokenizer: Tokenizer, token_id: int) -> str:
    """A token in a block that is shown; one that ends the text is a blank."""
    return tokenizer.decode([token_id]) or END_SIGN


def _line(question: str, done: str, rest: tuple[str, str]) -> Text:
    return Text.assemble((f"{question:<18}", "bold"), (done, "cyan"), rest)


def _table(replies: list[tuple[str, Reply]]) -> Table:
    table = Table(title="What each answer took", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("question", no_wrap=True)
    for name in ("tokens", "steps", "tokens/step"):
        table.add_column(name, justify="right")
    for question, reply in replies:
        row: list[Any] = [reply.num_tokens, reply.num_steps, f"{reply.num_tokens / max(1, reply.num_steps):.1f}"]
        table.add_row(question, *map(str, row))
    return table
