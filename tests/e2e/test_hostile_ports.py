"""Strangers at every listening port of real workers: nothing is executed, all is counted, answers stay right."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.demo import MODEL_DIR, questions
from cluster.directory import WorkerAddress
from cluster.model_info import ModelInfo
from cluster.prompts import request_from_messages
from cluster.served import ServedRequest
from language_worker.sampling_params import SamplingParams
from tests.e2e.front import PATIENT, WAIT_S, Front
from tests.e2e.worker_process import WorkerProcess
from tests.transfer.hostile import (
    Attacker,
    ask_for_segments,
    assert_bombs_are_live,
    forged_messages,
    listening_addresses,
    malformed_messages,
    segment_sockets,
)
from transfer.config import TransferConfig
from transfer.protocol.wire import MAX_HEADER_BYTES

KINDS = ("embedding", "language")
CONFIGS = {
    "embedding": {"dtype": "float32", "device": "cpu", "num_threads": 1, "cache_tokens": 0},
    "language": {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096},
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, WorkerProcess]]:
    with ExitStack() as stack:
        workers = {kind: WorkerProcess(kind) for kind in KINDS}
        for worker in workers.values():
            stack.callback(worker.close)
        yield workers


def make_request(info: ModelInfo, number: int, num_tokens: int) -> ServedRequest:
    question = questions()[number]
    image = {"type": "image", "image": str(question.image)}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": question.text}]}]
    endless = num_tokens > 20
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=endless)
    return request_from_messages(info, messages, sampling)


@pytest.mark.parametrize("transport", ["ipc", "tcp", "curve"])
def test_strangers_at_the_ports_of_workers(transport: str, tmp_path: Path, processes: dict[str, WorkerProcess]) -> None:
    info = ModelInfo.load(str(MODEL_DIR))
    with ExitStack() as stack:
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-"))
        bind = f"ipc://{sockets}/{{}}" if transport == "ipc" else "tcp://127.0.0.1:0"
        front = Front(bind.format("front"), TransferConfig(**PATIENT), curve=transport == "curve")
        stack.callback(front.close)
        opened = {}
        for kind, process in processes.items():
            stack.callback(process.ask, "close")
            values = {"address": bind.format(kind), "curve": transport == "curve", "config": CONFIGS[kind]}
            opened[kind] = process.ask("open", model=str(MODEL_DIR), transfer=PATIENT, **values)
        if transport == "curve":
            keys = [front.public_key, *(values["public_key"] for values in opened.values())]
            for process in processes.values():
                process.ask("allow", public_keys=keys)
        front.reach([WorkerAddress(name=kind, kind=kind, **values) for kind, values in opened.items()])
        running, _ = front.submit(make_request(info, 0, 400))
        assert running.first_chunk.wait(WAIT_S), "the request before the attack did not start"
        for kind, process in processes.items():
            attack(process, opened[kind]["address"], tmp_path, is_guarded=transport == "curve")
            sink, _ = front.submit(make_request(info, 1, 16))
            sink.finish()
            assert "".join(chunk.text for chunk in sink.chunks) == questions()[1].answer
        assert running.finish().num_generated_tokens == 400
        assert len(segment_sockets(processes["language"].process.pid)) == 1, "no port for segments was there to attack"
    assert_bombs_are_live(tmp_path)


def attack(process: WorkerProcess, address: str, folder: Path, *, is_guarded: bool) -> None:
    """Everything a stranger can send to each port of one worker. `is_guarded`: CURVE is on, so no message gets in."""
    addresses = listening_addresses(process.process.pid)
    assert address in addresses
    malformed, forged = malformed_messages(folder), forged_messages([], [])
    for port in addresses:
        before = dropped(process)
        with Attacker(port) as attacker:
            if is_guarded:
                num_malformed = process.ask("stats")["dropped_malformed"]
                attacker.assert_refused(malformed)
                now = process.ask("stats")["dropped_malformed"]
                assert now == num_malformed, "a message of a stranger got past CURVE"
            else:
                attacker.volley(malformed)
                assert dropped(process) - before >= len(malformed)
                attacker.volley(forged)
                assert dropped(process) - before >= len(malformed) + len(forged)
                attacker.oversized(5 * MAX_HEADER_BYTES)
            attacker.raw_bytes(folder)
    for path in segment_sockets(process.process.pid):
        refused = process.ask("stats")["transfer_segment_requests_refused_total"]
        num_asked = ask_for_segments(path, folder)
        assert process.ask("stats")["transfer_segment_requests_refused_total"] == refused + num_asked
    assert process.ask("stats")["handler_errors"] == 0


def dropped(process: WorkerProcess) -> int:
    """All messages that a worker dropped and counted."""
    return sum(count for name, count in process.ask("stats").items() if "dropped" in name)
