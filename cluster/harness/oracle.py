"""The questions of a scenario and what counts as right.

An answer is judged by the text that the client got. Texts that no oracle knows beforehand (kind "agreement") are right
when everyone got the same.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.demo import questions
from cluster.errors import ConfigError
from cluster.harness.plan import Oracle
from cluster.llm import LLM
from language_worker.sampling_params import SamplingParams

PLAIN = ("How many digits are there?", "What number is this?", "Tell me more.", "Name a colour.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """answer: the right one to a greedy request of `max_tokens`; None where it is not known beforehand."""

    text: str
    image: Path | None = None
    answer: str | None = None

    def messages(self) -> list[dict[str, Any]]:
        """As a client sends it."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.image is not None:
            data = base64.b64encode(self.image.read_bytes()).decode()
            kind = "jpeg" if self.image.suffix.lower() in (".jpg", ".jpeg") else "png"
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}})
        return [{"role": "user", "content": content}]


class Judge:
    """Knows the answers to the questions of a scenario. Thread-safe."""

    def __init__(self, oracle: Oracle, config: ClusterConfig | None) -> None:
        """config: of the cluster under test, resolved; needed for the oracle "local"."""
        self._kind = oracle.kind
        self._config = config
        self._lock = threading.Lock()
        self._known: dict[tuple[str, Path | None, int], str] = {}
        self._questions = questions_of(Path(oracle.file)) if oracle.kind == "file" else _shipped(oracle.kind)
        if oracle.kind == "local" and config is None:
            raise ConfigError("oracle.kind is local, which needs the checkpoint: use file or agreement with a url")

    def ask(self, count: int, share_of_images: float) -> list[Question]:
        """So many questions in a fixed order, that share of them with a picture."""
        pictured = [q for q in self._questions if q.image is not None]
        plain = [q for q in self._questions if q.image is None]
        asked = []
        for i in range(count):
            wants_image = int((i + 1) * share_of_images) > int(i * share_of_images)
            pool = (pictured if wants_image else plain) or pictured or plain
            asked.append(pool[i % len(pool)])
        return asked

    def prepare(self, asked: Sequence[Question], max_tokens: int) -> None:
        """Find the answers that have to be computed; before the load, so that they do not compete."""
        if self._kind != "local":
            return
        missing = {(q.text, q.image): q for q in asked if (q.text, q.image, max_tokens) not in self._known}
        if not missing or self._config is None:
            return
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        with LLM(model=self._config.model.path, language={"num_threads": 1}, **_overrides(self._config)) as llm:
            for question in missing.values():
                text = llm.chat(question.messages(), params)[0].outputs[0].text
                self._known[question.text, question.image, max_tokens] = text

    def wrong(self, question: Question, max_tokens: int, text: str) -> str:
        """What is wrong with an answer; empty when it is right."""
        key = (question.text, question.image, max_tokens)
        with self._lock:
            expected = question.answer if question.answer is not None else self._known.setdefault(key, text)
        picture = f" about {question.image.name}" if question.image else ""
        return "" if text == expected else f"{question.text!r}{picture}: got {text!r}, right is {expected!r}"


def _overrides(config: ClusterConfig) -> dict[str, Any]:
    """What decides which answer is the model's own; the rest (workers, caches, strategies) must not."""
    names = ("dtype", "device", "quantization", "config_overrides")
    model = {name: getattr(config.model, name) for name in names}
    return {**model, "lora": config.language.lora}


def _shipped(kind: str) -> list[Question]:
    knows = kind == "demo"
    pictured = [Question(text=q.text, image=q.image, answer=q.answer if knows else None) for q in questions()]
    return pictured if knows else [*pictured, *(Question(text=text) for text in PLAIN)]


def questions_of(path: Path) -> list[Question]:
    """In a file of known answers. Raises ConfigError for one that holds none, and for pictures that are not there."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [
            Question(
                text=str(entry["prompt"]),
                image=path.parent / entry["image"] if entry.get("image") else None,
                answer=None if entry.get("answer") is None else str(entry["answer"]),
            )
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no list of {{prompt, image, answer}}: {error}") from error
    if not found:
        raise ConfigError(f"{path} holds no question")
    if missing := [str(question.image) for question in found if question.image and not question.image.is_file()]:
        raise ConfigError(f"{path} asks about {missing[0]}, which is not there")
    return found
