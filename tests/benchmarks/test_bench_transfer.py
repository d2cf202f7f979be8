"""The transfer benchmark runs, measures what it says, and notices wrong bytes. How fast anything is, is not checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bench_transfer import Pair, main
from benchmarks.transfer_memory import ITEM_BLOCKS, SOURCE_SEED, TARGET_SEED, Content, Pool, Shape, memcpy_seconds
from benchmarks.transfer_paths import PATHS, new_ticket, ticket_from
from benchmarks.transfer_raw import check_slots
from benchmarks.transfer_tables import markdown, summarise

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(block_rows=4, num_items=3)


def test_every_path_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "transfer.json"
    assert main(["--rounds", "1", "--items", "2", "--block-rows", "4", "--requests", "1", "--json", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["paths"]) == {"memcpy", *PATHS}
    assert report["paths"].pop("streams-in-place")["handover_ms"] > 0
    for name, figures in report["paths"].items():
        assert figures["gb_per_s"] > 0 and figures["x_tcp"] > 0, name
        assert name == "memcpy" or figures["latency_ms"] > 0, name
    assert report["paths"]["tcp"]["x_tcp"] == report["paths"]["memcpy"]["x_memcpy"] == 1
    assert report["block_bytes"] == 4 * 3584 * 2 and report["pool_blocks"] == 2 * ITEM_BLOCKS
    assert {goal["met"] for goal in report["goals"]} <= {True, False} and len(report["goals"]) >= 4
    printed = capsys.readouterr().out
    assert report["congestion"] in printed and "streams-tcp" in printed
    if report["isolated"]:
        assert report["congestion"] == "reno"
    assert "streams-tcp" in out.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", ["--rounds", "--requests", "--block-rows"])
def test_a_count_of_nothing_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([flag, "0", "--json", str(tmp_path / "x.json")])
    assert "0 is not above zero" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_an_unknown_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no path 'tpc'"):
        main(["--paths", "tcp,tpc", "--json", str(tmp_path / "x.json")])


def test_a_failing_process_is_an_error_and_leaves_none_behind(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(RuntimeError, match="receiver: streams-ipc: ConfigError"):
        Pair(TINY, f"{missing}/{'x' * 200}", ["streams-ipc"], isolate=False)
    left = subprocess.run(["ps", "-o", "args", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False)
    assert "transfer_peer" not in left.stdout


def test_pools_tell_every_block_from_every_other() -> None:
    source, target = Pool(TINY, SOURCE_SEED), Pool(TINY, TARGET_SEED)
    expected = Content(TINY, SOURCE_SEED)
    assert sorted({expected.place(i) for i in range(TINY.num_blocks)}) == list(range(TINY.num_blocks))
    assert expected.place(5) == expected.place(5 + TINY.num_blocks)
    assert not check_slots(target, expected, 0, 1)
    memcpy_seconds(source, target, 3, TINY.num_blocks)
    assert check_slots(target, expected, 3, TINY.num_blocks)
    for byte in (0, 8, -1):
        target.block(9)[byte] ^= 1
        assert not check_slots(target, expected, 3, TINY.num_blocks), byte
        target.block(9)[byte] ^= 1
    target.block(9)[:] = source.block(10)
    assert not check_slots(target, expected, 3, TINY.num_blocks)


def test_rows_of_an_item_are_its_blocks() -> None:
    pool = Pool(TINY, SOURCE_SEED)
    rows = pool.rows(ITEM_BLOCKS + 2, 3)
    assert rows.shape == (3 * TINY.block_rows, 3584)
    blocks = np.concatenate([pool.block(ITEM_BLOCKS + i) for i in (2, 3, 4)])
    assert rows.view(torch.uint8).numpy().tobytes() == blocks.tobytes()


def test_tickets_survive_json() -> None:
    body = json.loads(json.dumps(new_ticket()))
    assert len(ticket_from(body).secret) == 16 and ticket_from(body).stream_id == body["stream_id"]
    with pytest.raises(ValueError, match="needs a ticket"):
        ticket_from(None)


def _round(tcp: float, streams: float, latency: tuple[float, float]) -> dict[str, object]:
    def figures(rate: float, seconds: float) -> dict[str, object]:
        costs = dict.fromkeys(("cpu_s_per_gb", "sender_cpu_s_per_gb", "receiver_cpu_s_per_gb"), 1 / rate)
        return {"gb_per_s": rate, "latency": [seconds, seconds, 9.0], "cold": [seconds], **costs}

    return {"tcp": figures(tcp, latency[0]), "streams-tcp": figures(streams, latency[1])}


def test_ratios_are_medians_of_ratios_within_rounds() -> None:
    rounds = [_round(4, 2, (1.0, 1.0)), _round(1, 1, (2.0, 2.2)), _round(8, 7.2, (1.0, 2.0))]
    summary = summarise(rounds)
    paths = summary["paths"]
    assert paths["streams-tcp"]["x_tcp"] == 0.9  # not the ratio of the medians, 2 / 4
    assert paths["streams-tcp"]["latency_x_tcp"] == 1.1
    assert paths["streams-tcp"]["latency_ms"] == 2000.0
    assert "x_memcpy" not in paths["tcp"]
    met = {goal["limit"]: goal["met"] for goal in summary["goals"]}
    assert met == {">= 0.95": False, "<= 0.4": False, "<= 1.1": True}
    text = markdown({**summary, "block_bytes": 1, "rounds": 3})
    assert "| streams-tcp | 2.00 | 0.90 |" in text


def test_two_processes_share_a_namespace_where_that_is_allowed() -> None:
    code = (
        "import os, subprocess, sys\n"
        "from benchmarks import network_namespace as n\n"
        "before = os.readlink('/proc/self/ns/net')\n"
        "if not n.isolate('reno'): print('refused'); sys.exit()\n"
        "after = os.readlink('/proc/self/ns/net')\n"
        "child = 'from benchmarks import network_namespace as n; import os, sys; n.join(int(sys.argv[1]));'"
        "    'print(os.readlink(\"/proc/self/ns/net\"), n.congestion_control())'\n"
        "joined = subprocess.run([sys.executable, '-c', child, str(os.getpid())], capture_output=True, text=True)\n"
        "print(before != after, joined.stdout.split() == [after, n.congestion_control()], joined.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() in (["refused"], ["True", "True"]), done
