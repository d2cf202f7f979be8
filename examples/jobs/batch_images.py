"""Asks one question about every image below a folder and writes the answers as JSONL or Parquet, with Ray Data.

    ray job submit --working-dir . -- python -m examples.jobs.batch_images --model DIR --images DIR --output DIR

Each actor of the pool holds the model, both halves in one process, and needs no server. A row has `path`, `answer` and
`error`: an image that cannot be read is a row with an error and costs nobody else theirs. The output folder appears
when all is written, never half. Exit code: 0 when every image was answered, 1 when some were not, 2 when nothing could
be asked. `pip install 'tandem-serve[data]'` brings what Ray Data needs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from cluster import LLM, SamplingParams
from cluster.errors import ClusterError
from embedding_worker.errors import EmbedError
from language_worker.errors import EngineError
from transfer.errors import TransferError

EXTENSIONS = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tiff"]
REQUEST_ERRORS = (ClusterError, EmbedError, EngineError, TransferError)


class Asker:
    """One actor of the pool. Requests of a batch run together; each fails for itself."""

    def __init__(self, model: str, question: str, max_tokens: int, overrides: dict[str, Any]) -> None:
        self._llm = LLM(model=model, **overrides)
        self._question = question
        self._params = SamplingParams(max_tokens=max_tokens, temperature=0.0)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(len(batch["path"])) as pool:
            rows = list(pool.map(self._ask, batch["bytes"]))
        answers, errors = zip(*rows, strict=True)
        return {"path": batch["path"], "answer": np.array(answers, object), "error": np.array(errors, object)}

    def _ask(self, image: bytes) -> tuple[str, str]:
        content = [{"type": "image", "image": bytes(image)}, {"type": "text", "text": self._question}]
        try:
            return self._llm.chat([{"role": "user", "content": content}], self._params)[0].outputs[0].text, ""
        except REQUEST_ERRORS as error:
            return "", f"{type(error).__name__}: {error}"


def run(options: argparse.Namespace) -> int:
    output = Path(options.output)
    partial = output.with_name(output.name + ".partial")
    if output.exists():
        return _refused(f"{output} exists; name a folder that does not")
    if not any(path.suffix[1:].lower() in EXTENSIONS for path in Path(options.images).rglob("*")):
        return _refused(f"there is no image below {options.images}")
    shutil.rmtree(partial, ignore_errors=True)
    ray.init(logging_level="WARNING")
    try:
        answers = _answers(options).materialize()
        getattr(answers, f"write_{options.format}")(str(partial))
        num_rows, num_failed = answers.count(), answers.filter(expr="error != ''").count()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        ray.shutdown()
    print(f"{num_rows - num_failed} of {num_rows} images answered; {output}")
    return 1 if num_failed else 0


def _answers(options: argparse.Namespace) -> ray.data.Dataset:
    """path, answer, error; in no particular order."""
    overrides: dict[str, Any] = {"language": {"num_threads": options.num_threads}} if options.num_threads else {}
    overrides |= {name: getattr(options, name) for name in ("dtype", "device") if getattr(options, name)}
    images = ray.data.read_binary_files(options.images, include_paths=True, file_extensions=EXTENSIONS)
    return images.map_batches(
        Asker,
        fn_constructor_args=(options.model, options.question, options.max_tokens, overrides),
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=options.cpus_per_actor,
        num_gpus=options.gpus_per_actor,
    )


def _refused(text: str) -> int:
    print(f"batch_images: {text}", file=sys.stderr)
    return 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, on every node")
    parser.add_argument("--images", required=True, help="folder of images, on every node (a shared file system)")
    parser.add_argument("--output", required=True, help="folder to make; on a file system that all nodes share")
    parser.add_argument("--question", default="Describe this image.")
    parser.add_argument("--format", choices=["json", "parquet"], default="json", help="json: one object a line")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--actors", type=int, default=1, help="processes that hold the model")
    parser.add_argument("--cpus-per-actor", type=float, default=1.0)
    parser.add_argument("--gpus-per-actor", type=float, default=0.0)
    parser.add_argument("--num-threads", type=int, default=0, help="torch threads of an actor (0: torch's choice)")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--device", default="")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(_options(None)))
