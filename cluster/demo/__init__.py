"""The shipped demos: a tiny Qwen2.5-VL checkpoint trained to read handwritten digits, and images to ask about; a tiny
LLaDA trained to add, and sums that it never saw; a tiny LLaDA-V that reads the same digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
IMAGE_DIR = Path(__file__).parent / "images"
MODEL_NAME = "tandem-demo"
DIFFUSION_MODEL_DIR = Path(__file__).parent / "diffusion"
READER_MODEL_DIR = Path(__file__).parent / "reader"
SUMS = ("54+95", "41+98 24+19", "87+95 13+63", "96+54 68+30 29+72", "91+56 41+32 76+40", "56+48 16+64 91+23")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A shipped image, a question about it, and the right answer."""

    image: Path
    text: str
    answer: str


def answer_to_sums(question: str) -> str:
    """What the diffusion model should say."""
    return " ".join(f"{part}={sum(map(int, part.split('+')))}" for part in question.split())


def questions() -> list[Question]:
    """Every shipped question."""
    entries = json.loads((IMAGE_DIR / "questions.json").read_text(encoding="utf-8"))
    return [Question(image=IMAGE_DIR / e["file"], text=e["question"], answer=e["answer"]) for e in entries]
