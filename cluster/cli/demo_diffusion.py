"""`tandem demo --diffusion`: models that fill in masks do sums and read the shipped images; their blocks fill in live.

One process, no Ray: what is shown is the decoding. Dots are masks; a table at the end says what each answer took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.flags import config_from
from cluster.demo import DIFFUSION_MODEL_DIR, READER_MODEL_DIR, SUMS, Question, answer_to_sums, questions
from cluster.llm import LLM
from language_worker.diffusion_params import DiffusionParams
from language_worker.sampling_params import SamplingParams
from language_worker.tokenizer import Tokenizer

MASK_SIGN, END_SIGN = "·", " "
FRAME_S = 0.15  # a step takes a few milliseconds, which nobody would see
SUMS_LENGTH, READER_LENGTH = 32, 8
BLOCK_LENGTH = 16
LEAST_RIGHT = 0.8  # of the answers: a reader this small takes one digit for another now and then


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A question as it is shown, what is sent, and the right answer."""

    shown: str
    content: Any
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One answer and what it took."""

    task: Task
    text: str
    num_steps: int
    num_tokens: int

    @property
    def is_right(self) -> bool:
        return self.text == self.task.answer


def run(options: argparse.Namespace) -> int:
    """0 when nearly every answer is right."""
    console = Console()
    sums = [Task(shown=question, content=question, answer=answer_to_sums(question)) for question in SUMS]
    replies = _ask_all(options, console, DIFFUSION_MODEL_DIR, SUMS_LENGTH, sums)
    replies += _ask_all(options, console, READER_MODEL_DIR, READER_LENGTH, [_picture(asked) for asked in questions()])
    console.print(_table(replies))
    num_right = sum(reply.is_right for reply in replies)
    console.print(f"{num_right} of {len(replies)} answers are right")
    return 0 if num_right >= LEAST_RIGHT * len(replies) else 1


def _picture(asked: Question) -> Task:
    content = [{"type": "image", "image": asked.image}, {"type": "text", "text": asked.text}]
    return Task(shown=f"{asked.image.name} {asked.text}", content=content, answer=asked.answer)


def _ask_all(
    options: argparse.Namespace, console: Console, folder: Path, length: int, tasks: Sequence[Task]
) -> list[Reply]:
    tokenizer = Tokenizer(folder)
    diffusion = DiffusionParams(block_length=min(BLOCK_LENGTH, length), show_steps=True)
    params = SamplingParams(max_tokens=length, temperature=0.0, diffusion=diffusion)
    with LLM.from_config(config_from(options, model__path=str(folder))) as llm:
        return [_ask(llm, task, params, tokenizer, console) for task in tasks]


def _ask(llm: LLM, task: Task, params: SamplingParams, tokenizer: Tokenizer, console: Console) -> Reply:
    text, num_steps, num_tokens = "", 0, 0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for chunk in llm.stream([{"role": "user", "content": task.content}], params):
            text += chunk.text
            num_tokens += len(chunk.token_ids)
            if chunk.preview is not None and console.is_terminal:
                block = "".join(MASK_SIGN if token is None else _sign(tokenizer, token) for token in chunk.preview)
                live.update(_line(task.shown, text, (block, "yellow")), refresh=True)
                time.sleep(FRAME_S)
            num_steps += chunk.preview is not None
    reply = Reply(task=task, text=text, num_steps=num_steps, num_tokens=num_tokens)
    console.print(_line(task.shown, text, (" right", "green") if reply.is_right else (" wrong", "red")))
    return reply


def _sign(tokenizer: Tokenizer, token_id: int) -> str:
    """A token in a block that is shown; one that ends the text is a blank."""
    return tokenizer.decode([token_id]) or END_SIGN


def _line(question: str, done: str, rest: tuple[str, str]) -> Text:
    return Text.assemble((f"{question:<18} ", "bold"), (done, "cyan"), rest)


def _table(replies: Sequence[Reply]) -> Table:
    table = Table(title="What each answer took", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("question", no_wrap=True)
    for name in ("tokens", "steps", "tokens/step"):
        table.add_column(name, justify="right")
    for reply in replies:
        figures = (reply.num_tokens, reply.num_steps, f"{reply.num_tokens / max(1, reply.num_steps):.1f}")
        table.add_row(reply.task.shown, *map(str, figures))
    return table
