"""Draws the pictures that `tandem demo` asks about: `python -m examples.demo_images --out cluster/demo/images`.

Held-out glyphs only, so the shipped model has never seen any of them. Beside the PNG files goes questions.json,
a list of file, question and expected answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from examples.digits import Kind, draw

PICTURES: tuple[tuple[str, int, int, Kind, str], ...] = (
    ("one.png", 14, 1, "number", "What number is written here?"),
    ("two.png", 25, 2, "number", "Which number is written here?"),
    ("three.png", 35, 3, "number", "Read the number."),
    ("three.png", 35, 3, "colour", "What colour are the digits?"),
    ("four.png", 44, 4, "number", "What number do you see?"),
    ("four.png", 44, 4, "count", "How many digits are there?"),
    ("five.png", 56, 5, "number", "What number is this?"),
    ("five.png", 56, 5, "colour", "What color is the number?"),
    ("five.png", 56, 5, "count", "Count the digits."),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the demo's pictures.")
    parser.add_argument("--out", type=Path, required=True)
    write_images(parser.parse_args().out)


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, seed, count, kind, question in PICTURES:
        composition = draw(seed, "held-out", count=count)
        composition.image.save(folder / name, optimize=True)
        entries.append({"file": name, "question": question, "answer": composition.answer(kind)})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
