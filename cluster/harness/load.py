"""One load: requests from several threads, half of them streamed, each timed and judged."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from cluster.harness.oracle import Judge, Question
from cluster.harness.plan import Load
from cluster.harness.target import Target

REQUEST_TIMEOUT_S = 300.0
PATH = "/v1/chat/completions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request. Times in seconds, started_s since the scenario began. ttft_s: of streamed answers. wrong: what is
    wrong with the answer. failure: the error's code, for a request that was not answered; a stream that breaks must
    end with a typed error event, everything else is "broken".
    """

    question: str
    started_s: float
    total_s: float
    is_streamed: bool
    ttft_s: float = 0.0
    num_tokens: int = 0
    text: str = ""
    wrong: str = ""
    failure: str = ""


@dataclass(slots=True)
class _Answer:
    text: str = ""
    ttft_s: float = 0.0
    num_tokens: int = 0
    failure: str = ""
    is_done: bool = field(default=False)


def run_load(
    target: Target,
    judge: Judge,
    load: Load,
    *,
    began_s: float,
    on_answers: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Every request's sample, in the order they were started. on_answers: told how many were answered so far, by the
    threads that ask.
    """
    asked = judge.ask(load.requests, load.images)
    judge.prepare(asked, load.max_tokens)
    model = target.model_name()
    lock, num_answered = threading.Lock(), 0
    limits = httpx.Limits(max_connections=load.concurrency, max_keepalive_connections=load.concurrency)
    with httpx.Client(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:

        def ask(index: int) -> Sample:
            nonlocal num_answered
            sample = _ask(client, target, judge, asked[index], load, model, is_streamed=index % 2 == 0, began_s=began_s)
            with lock:
                num_answered += 1
                count = num_answered
            on_answers(count)
            return sample

        with ThreadPoolExecutor(load.concurrency, thread_name_prefix="harness-load") as pool:
            return list(pool.map(ask, range(load.requests)))


def _ask(
    client: httpx.Client,
    target: Target,
    judge: Judge,
    question: Question,
    load: Load,
    model: str,
    *,
    is_streamed: bool,
    began_s: float,
) -> Sample:
    body = {
        "model": model,
        "messages": question.messages(),
        "temperature": 0,
        "max_tokens": load.max_tokens,
        "stream": is_streamed,
    }
    started_s = time.monotonic()
    try:
        ask = _stream if is_streamed else _whole
        answer = ask(client, target.url + PATH, dict(target.headers), body, started_s)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        answer = _Answer(failure=f"broken: {type(error).__name__}: {error}")
    return Sample(
        question=question.text,
        started_s=started_s - began_s,
        total_s=time.monotonic() - started_s,
        is_streamed=is_streamed,
        ttft_s=answer.ttft_s,
        num_tokens=answer.num_tokens,
        text=answer.text,
        wrong="" if answer.failure else judge.wrong(question, load.max_tokens, answer.text),
        failure=answer.failure,
    )


def _whole(client: httpx.Client, url: str, headers: dict[str, str], body: dict[str, Any], started_s: float) -> _Answer:
    response = client.post(url, json=body, headers=headers)
    answer = response.json()
    if response.status_code != 200:
        return _Answer(failure=_code(answer))
    text = answer["choices"][0]["message"]["content"] or ""
    return _Answer(text=text, num_tokens=int(answer["usage"]["completion_tokens"]))


def _stream(client: httpx.Client, url: str, headers: dict[str, str], body: dict[str, Any], started_s: float) -> _Answer:
    """Until [DONE]; a stream that ends without it, and without an error event, is broken."""
    answer = _Answer()
    body = {**body, "stream_options": {"include_usage": True}}
    with client.stream("POST", url, json=body, headers=headers) as response:
        if response.status_code != 200:
            response.read()
            return _Answer(failure=_code(response.json()))
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not line or data == "[DONE]":
                answer.is_done |= bool(line)
                continue
            event = json.loads(data)
            if "error" in event:
                return _Answer(failure=_code(event))
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                answer.ttft_s = answer.ttft_s or (time.monotonic() - started_s if piece else 0.0)
                answer.text += piece
            answer.num_tokens = int((event.get("usage") or {}).get("completion_tokens", answer.num_tokens))
    return answer if answer.is_done else _Answer(failure="broken: the stream ended without [DONE]")


def _code(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return str(code) if code else f"broken: {str(body)[:200]}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that the share of all does not exceed; 0 of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0
