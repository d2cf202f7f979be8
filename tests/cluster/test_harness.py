"""The harness against a server that answers as a test wants: what is wrong is found, counted and shown."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from cluster.cli.parser import build_parser
from cluster.config import build_config
from cluster.demo import MODEL_DIR, questions
from cluster.errors import ConfigError
from cluster.harness import target as target_module
from cluster.harness.load import percentile
from cluster.harness.oracle import Judge
from cluster.harness.plan import Fault, Topology, load_scenario
from cluster.harness.plots import distribution, scatter
from language_worker.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
METRICS = 'tandem:worker_up{worker="language-0"} 1.0\ntandem:transfer_blocks_in_use{worker="language-0"} %d\n'
KEY = "a-key-of-the-deployment"


class Server:
    """One deployment. answer: text -> what comes back: a text, a status with a code, or None for a broken stream."""

    def __init__(self) -> None:
        self.answers = {question.text: question.answer for question in questions()}
        self.answer: Callable[[str, int], str | tuple[int, str] | None] = lambda text, _: self.answers[text]
        self.count = 0
        self.blocks_held = 0
        self.url = ""
        self._lock = threading.Lock()

    def next(self, text: str) -> str | tuple[int, str] | None:
        with self._lock:
            self.count += 1
            return self.answer(text, self.count)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._send(200, (METRICS % server.blocks_held).encode())
            else:
                self._send(200, json.dumps({"data": [{"id": "m"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert body["temperature"] == 0 and body["model"] == "m"
            if self.headers.get("authorization") != f"Bearer {KEY}":
                self._send(401, json.dumps({"error": {"code": "invalid_api_key"}}).encode())
                return
            text = body["messages"][0]["content"][-1]["text"]
            answer = server.next(text)
            if isinstance(answer, tuple):
                self._send(answer[0], json.dumps({"error": {"code": answer[1]}}).encode())
            elif body["stream"]:
                self._send(200, _events(answer).encode())
            else:
                choice = {"message": {"content": answer or ""}}
                self._send(200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 2}}).encode())

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def _events(answer: str | None) -> str:
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in answer or "x"]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return text if answer is None else text + "data: [DONE]\n\n"


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()

    class Http(ThreadingHTTPServer):
        daemon_threads = True

    with Http(("127.0.0.1", 0), _handler(served)) as http:
        served.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield served
        http.shutdown()
        thread.join()


class Outcome:
    """One run of the command."""

    def __init__(self, code: int, folder: Path, said: str) -> None:
        self.code = code
        self.said = said
        self.suite = ElementTree.parse(folder / "junit.xml").getroot()[0]
        self.page = (folder / "report.html").read_text()
        self.figures = json.loads((folder / "figures.json").read_text())


@pytest.fixture
def harness(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`tandem harness` on a scenario of one step against the server."""

    def run(expect: dict[str, Any] | None = None, oracle: dict[str, Any] | None = None, **step: Any) -> Outcome:
        scenario = {
            "name": "a scenario",
            "oracle": oracle or {"kind": "demo"},
            "steps": [
                {
                    "name": "a step",
                    "load": {"requests": 12, "concurrency": 3, "images": 1.0},
                    "expect": {"heals": False, **(expect or {})},
                    **step,
                }
            ],
        }
        (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(scenario))
        (tmp_path / "key").write_text(KEY + "\n")
        arguments = ["harness", str(tmp_path / "scenario.yaml"), "--url", server.url, "--api-key-file"]
        arguments += [str(tmp_path / "key"), "--junit", str(tmp_path / "junit.xml")]
        arguments += ["--html", str(tmp_path / "report.html"), "--json", str(tmp_path / "figures.json")]
        options = build_parser().parse_args(arguments)
        return Outcome(int(options.run(options)), tmp_path, capsys.readouterr().out)

    return run


def test_right_answers_pass(harness: Callable[..., Outcome], server: Server) -> None:
    outcome = harness({"heals": True})
    assert outcome.code == 0 and server.count == 12
    assert (outcome.suite.get("tests"), outcome.suite.get("failures"), outcome.suite.get("errors")) == ("1", "0", "0")
    samples = outcome.figures[0]["steps"][0]["samples"]
    assert len(samples) == 12 and sum(s["is_streamed"] for s in samples) == 6
    assert all(s["ttft_s"] > 0 for s in samples if s["is_streamed"])
    assert outcome.page.count("<svg") == 2 and "passed" in outcome.page and "http" not in outcome.page


PLANTED: dict[str, tuple[Callable[[str, int], Any], str]] = {
    "one wrong answer": (lambda text, count: "wrong" if count == 5 else None, "1 of 12 answers are wrong"),
    "an error": (lambda text, count: (503, "no_worker") if count == 3 else None, "1 requests failed, at most 0 may"),
    "an error without a code": (lambda text, count: (500, "") if count == 3 else None, "without a typed error"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_failure_is_found_and_shown(what: str, harness: Callable[..., Outcome], server: Server) -> None:
    plant, words = PLANTED[what]
    server.answer = lambda text, count: plant(text, count) or server.answers[text]
    outcome = harness()
    assert outcome.code == 1
    (failure,) = outcome.suite.iter("failure")
    assert words in (failure.text or "") and words in outcome.page and words in outcome.said
    assert outcome.suite.get("failures") == "1" and 'class="failed"' in outcome.page


def test_a_stream_without_its_end_is_broken(harness: Callable[..., Outcome], server: Server) -> None:
    server.answer = lambda text, count: None
    outcome = harness({"max_failed": 12})
    assert outcome.code == 1 and "the stream ended without [DONE]" in outcome.page


def test_failures_that_are_expected_pass(harness: Callable[..., Outcome], server: Server) -> None:
    server.answer = lambda text, count: (503, "worker_lost") if count in (2, 4) else server.answers[text]
    assert harness({"max_failed": 2}).code == 0
    server.count = 0
    assert harness({"max_failed": 1}).code == 1


def test_answers_that_differ_from_each_other_are_wrong(harness: Callable[..., Outcome], server: Server) -> None:
    server.answer = lambda text, count: f"{text} always"
    assert harness(oracle={"kind": "agreement"}).code == 0
    server.answer = lambda text, count: f"{text} {count}"
    assert "answers are wrong" in harness(oracle={"kind": "agreement"}).said


def test_answers_from_a_file(harness: Callable[..., Outcome], server: Server, tmp_path: Path) -> None:
    server.answers = {"2 + 2?": "4", "3 + 3?": "6"}
    known = [{"prompt": prompt, "answer": answer} for prompt, answer in server.answers.items()]
    (tmp_path / "known.json").write_text(json.dumps(known))
    assert harness(oracle={"kind": "file", "file": "known.json"}).code == 0
    known[1]["answer"] = "7"
    (tmp_path / "known.json").write_text(json.dumps(known))
    assert "'3 + 3?': got '6', right is '7'" in harness(oracle={"kind": "file", "file": "known.json"}).said


def test_what_is_left_behind_is_told(
    harness: Callable[..., Outcome], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.harness.target.HEAL_S", 0.2)
    server.blocks_held = 3
    assert "it does not heal: language-0 transfer_blocks_in_use 3" in harness({"heals": True}).said


def test_faults_need_a_cluster_of_ones_own(harness: Callable[..., Outcome]) -> None:
    outcome = harness(fault={"kind": "kill", "worker": "language-0"})
    assert outcome.code == 1 and outcome.suite.get("errors") == "1"
    assert "faults need a cluster that the harness started" in outcome.page


def test_a_worker_of_another_machine_is_not_mistaken_for_a_process_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever has that number here goes on living."""

    class Elsewhere:
        url = "http://127.0.0.1:1"

        def __init__(self, config: object, **_: object) -> None:
            self.workers = {"language-0": SimpleNamespace(pid=bystander.pid)}

        def is_here(self, name: str) -> bool:
            return False

        def close(self) -> None:
            pass

    monkeypatch.setattr(target_module, "RayCluster", Elsewhere)
    monkeypatch.setattr(target_module, "connect", lambda *_: False)
    monkeypatch.setattr(target_module, "disconnect", lambda: None)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            topology = Topology(config={"model": {"path": str(MODEL_DIR)}})
            with (
                target_module.Target(topology, on_status=lambda text: None) as target,
                pytest.raises(ConfigError, match="of another machine"),
            ):
                target.deal(Fault(kind="kill", worker="language-0"))
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_two_split_clusters_find_room_for_an_upgrade() -> None:
    config = build_config({"workers": {"embedding": 1, "prefill": 2, "decode": 3}})
    room = target_module._with_room(config, 2).workers
    assert room.counts == {"embedding": 2, "prefill": 4, "decode": 6}


def test_a_fault_that_never_happens_fails(harness: Callable[..., Outcome]) -> None:
    outcome = harness(fault={"kind": "kill", "worker": "language-0", "after_answers": 1000})
    assert outcome.code == 1 and "the fault never happened" in outcome.said


def test_a_deployment_that_is_not_there_is_an_error(harness: Callable[..., Outcome], server: Server) -> None:
    server.url = "http://127.0.0.1:1"
    outcome = harness()
    assert outcome.code == 1 and outcome.suite.get("errors") == "1" and "127.0.0.1:1" in outcome.said


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "x", "steps": []}, "steps"),
        ({"name": "x", "steps": [{"name": "a", "laod": {}}]}, "steps.0.laod"),
        ({"name": "x", "steps": [{"name": "a", "load": {"requests": "many"}}]}, "steps.0.load.requests"),
        ({"name": "x", "steps": [{"name": "a", "fault": {"kind": "kill"}}]}, "need a worker"),
        ({"name": "x", "oracle": {"kind": "file"}, "steps": [{"name": "a"}]}, "oracle.file"),
        ({"name": "x", "topology": {"config": {"model": [1]}}, "steps": [{"name": "a"}]}, "topology.config.model"),
        ({"name": "x", "topology": {"config": {"model": "demo"}}, "steps": [{"name": "a"}]}, "topology.config.model"),
        ({"name": "x", "topology": {"config": {"model": {"path": [1]}}}, "steps": [{"name": "a"}]}, "model.path"),
        ({"name": "x", "topology": {"config": {"workers": {"embeding": 2}}}, "steps": [{"name": "a"}]}, "embeding"),
        ({"name": "x", "topology": {"url": "ftp://here"}, "steps": [{"name": "a"}]}, "topology.url"),
        (
            {"name": "x", "steps": [{"name": "a", "fault": {"kind": "upgrade", "config": {"langage": {}}}}]},
            "steps.0.fault.config: unknown setting langage",
        ),
    ],
)
def test_wrong_files_are_refused_with_the_place(tree: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"s\.yaml|x: ") as caught:
        load_scenario(tmp_path / "s.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (None, "No such file"),
        ({"prompt": "x"}, "holds no list"),
        ([{"answer": "x"}], "holds no list"),
        ([], "holds no question"),
        ([{"prompt": "x", "answer": "y", "image": "nowhere.png"}], "nowhere.png, which is not there"),
    ],
)
def test_wrong_files_of_answers_are_refused_before_anything_starts(known: Any, words: str, tmp_path: Path) -> None:
    if known is not None:
        (tmp_path / "known.json").write_text(json.dumps(known))
    tree = {"name": "x", "oracle": {"kind": "file", "file": "known.json"}, "steps": [{"name": "a"}]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree))
    options = build_parser().parse_args(["harness", str(tmp_path / "s.yaml"), "--junit", str(tmp_path / "junit.xml")])
    with pytest.raises(ConfigError, match=words):
        options.run(options)


def test_an_oracle_that_cannot_be_asked_is_in_the_report(
    harness: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise EngineError("the checkpoint is not whole")

    monkeypatch.setattr(Judge, "prepare", fails)
    outcome = harness()
    assert outcome.code == 1 and outcome.suite.get("errors") == "1" and "not whole" in outcome.page


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "harness").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_scenarios_are_accepted(path: Path) -> None:
    scenario = load_scenario(path)
    assert (Path(scenario.topology.config["model"]["path"]) / "config.json").is_file()
    Judge(scenario.oracle, build_config(scenario.topology.config).resolve())


def test_plots_are_well_formed_whatever_they_show() -> None:
    for text in (
        scatter("<a & b>", {"x": [], "y": [(0.0, 0.0), (3.0, 1e9)]}, "s", "ms", [(1.0, "killed <it>")]),
        distribution("empty", {}, "ms"),
        distribution("one", {"a": [5.0]}, "ms"),
    ):
        picture = ElementTree.fromstring(text)
        assert picture.tag == "svg" and "nan" not in text


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.95, 5.0), (1.0, 5.0)])
def test_percentiles(share: float, expected: float) -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], share) == expected
    assert percentile([], share) == 0.0
