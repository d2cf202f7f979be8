"""The shipped demo: a tiny Qwen2.5-VL checkpoint trained to read handwritten digits, and images to ask about."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
IMAGE_DIR = Path(__file__).parent / "images"
MODEL_NAME = "tandem-demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A shipped image, a question about it, and the right answer."""

    image: Path
    text: str
    answer: str


def questions() -> list[Question]:
    """Every shipped question."""
    entries = json.loads((IMAGE_DIR / "questions.json").read_text(encoding="utf-8"))
    return [Question(image=IMAGE_DIR / e["file"], text=e["question"], answer=e["answer"]) for e in entries]
