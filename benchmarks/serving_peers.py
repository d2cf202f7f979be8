"""The two engines that the serving benchmark compares, behind one interface: requests in, arrival times out.

Both run in this process, take prompts and encoded images, and do everything themselves: decoding, preprocessing,
tokenisation, vision tower, text model. Greedy, with ends of sequence ignored, so both generate equally many tokens.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from benchmarks.serving_models import BenchModel, BenchRequest
from cluster import LLM, SamplingParams

IMAGE_TOKEN = "<|image_pad|>"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Seconds from the call to the first and the last token; the token ids of every answer."""

    first_s: float
    total_s: float
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s

    @property
    def ms_per_token(self) -> float:
        """Mean time between two tokens of one answer, after the first."""
        return 1e3 * (self.total_s - self.first_s) / (len(self.token_ids[0]) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one call of `generate` made: when each step's tokens were there, counted from the call, and the answers."""

    arrivals_s: tuple[float, ...]
    total_s: float
    token_ids: tuple[tuple[int, ...], ...]


class Peer(Protocol):
    """One engine with a model loaded."""

    def one(self, request: BenchRequest, new_tokens: int | None = None) -> Run:
        """Answer one request, with the model's number of new tokens unless another one is said."""

    def many(self, requests: Sequence[BenchRequest]) -> Run:
        """Answer requests that arrive together."""

    def close(self) -> None:
        """Free the model."""


class Ours:
    """Tandem's `LLM`: both halves, joined by in-memory endpoints. Nothing is remembered: caches of embeddings and of
    prefixes are off.

    language: further settings of the language half.
    """

    def __init__(self, model: BenchModel, dtype: str, threads: int, **language: Any) -> None:
        self._llm = LLM(
            model=str(model.folder),
            dtype=dtype,
            embedding={"cache_tokens": 0, "num_threads": threads},
            language={"num_threads": threads, "prefix_cache": False, **language},
        )
        self._params = SamplingParams(max_tokens=model.new_tokens, temperature=0.0, ignore_eos=True)

    def one(self, request: BenchRequest, new_tokens: int | None = None) -> Run:
        params = dataclasses.replace(self._params, max_tokens=new_tokens or self._params.max_tokens)
        ids: list[int] = []
        first_s = 0.0
        started = time.perf_counter()
        for chunk in self._llm.stream(prompt_of(request), params):
            first_s = first_s or time.perf_counter() - started
            ids.extend(chunk.token_ids)
        return Run(first_s=first_s, total_s=time.perf_counter() - started, token_ids=(tuple(ids),))

    def many(self, requests: Sequence[BenchRequest]) -> Run:
        started = time.perf_counter()
        outputs = self._llm.generate([prompt_of(request) for request in requests], self._params)
        total_s = time.perf_counter() - started
        first_s = max(output.hops["ttft_ms"] for output in outputs) / 1e3
        ids = tuple(tuple(output.outputs[0].token_ids) for output in outputs)
        return Run(first_s=first_s, total_s=total_s, token_ids=ids)

    def stats(self) -> dict[str, Any]:
        """Counters of the language half."""
        return dict(self._llm.stats()["language-0"])

    def close(self) -> None:
        self._llm.close()


class Transformers:
    """transformers' own model and `generate`; requests that arrive together become one left-padded batch."""

    def __init__(self, model: BenchModel, dtype: str, threads: int) -> None:
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._threads = threads
        self._new_tokens = model.new_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(model.folder, padding_side="left")
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(model.folder)
        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model.folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None
        self._image_id = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def one(self, request: BenchRequest, new_tokens: int | None = None) -> Run:
        return self.many([request], new_tokens)

    def many(self, requests: Sequence[BenchRequest], new_tokens: int | None = None) -> Run:
        made = self.generate(requests, new_tokens or self._new_tokens)
        return Run(first_s=made.arrivals_s[0], total_s=made.total_s, token_ids=made.token_ids)

    def generate(self, requests: Sequence[BenchRequest], new_tokens: int) -> Batch:
        """One left-padded batch, `new_tokens` tokens for every request of it."""
        torch.set_num_threads(self._threads)
        arrivals: list[float] = []
        started = time.perf_counter()
        inputs = self._inputs(requests)

        def note_arrival(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """A stopping criterion is asked after every token, and this one never stops."""
            arrivals.append(time.perf_counter() - started)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        with torch.inference_mode():
            ids = self._model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, stopping_criteria=[note_arrival]
            )
        answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
        total_s = time.perf_counter() - started
        return Batch(arrivals_s=tuple(arrivals), total_s=total_s, token_ids=tuple(map(tuple, answers)))

    def _inputs(self, requests: Sequence[BenchRequest]) -> dict[str, torch.Tensor]:
        encoded_images = [request.image for request in requests if request.image is not None]
        if not encoded_images:
            encoded = self._tokenizer([r.prompt for r in requests], padding=len(requests) > 1, return_tensors="pt")
            return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image in encoded_images]
        features = self._processor(images=images, return_tensors="pt")
        rows = iter((features["image_grid_thw"].prod(-1) // self._processor.merge_size**2).tolist())
        texts = [
            r.prompt if r.image is None else r.prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * next(rows)) for r in requests
        ]
        encoded = self._tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")
        return {
            "pixel_values": features["pixel_values"],
            "image_grid_thw": features["image_grid_thw"],
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "mm_token_type_ids": (encoded["input_ids"] == self._image_id).to(torch.int32),
        }

    def close(self) -> None:
        del self._model


def prompt_of(request: BenchRequest) -> dict[str, Any]:
    """As `LLM` takes it."""
    return {"prompt": request.prompt, "images": [] if request.image is None else [request.image]}
