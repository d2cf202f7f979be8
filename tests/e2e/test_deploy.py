"""What the chart renders, run for real on a guarded Ray head: the serve job, its probes, its way to stop; and the jobs.

The node of the head offers room for every role, as the pods of a release do together.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.demo import IMAGE_DIR, MODEL_DIR, questions
from tests.e2e.ray_head import BIN, ROOT, RayHead, free_ports
from tests.helm.rendering import (
    CHART,
    Object,
    asked_figures,
    containers,
    dashboard_queries,
    of_kind,
    render,
    tandem_configs,
)
from tests.profiles import IS_SOAK
from tests.waiting import eventually

pytestmark = pytest.mark.ray

WAIT_S = 120.0
KEY = "a-key-that-nobody-else-has"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The chart for CPUs, with the model and the ports of this machine."""
    values = yaml.safe_load((CHART / "examples" / "cpu.yaml").read_text())
    values["model"] = {"path": str(MODEL_DIR)}
    values["gateway"] |= {"port": free_ports(1)[0], "drainSeconds": int(WAIT_S)}
    values["config"]["workers"] = {"num_cpus": 0.5, "health_timeout_s": WAIT_S}
    values["config"]["transfer"] = {"peer_timeout_s": 90.0}
    values["config"]["model"]["served_model_name"] = "tandem-demo"
    path = tmp_path_factory.mktemp("values") / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return render("--values", str(path))


class ServeJob:
    """The serve job's container, its ConfigMaps and its secret as files of this machine."""

    def __init__(self, release: list[Object], head: RayHead, folder: Path) -> None:
        self._head, self._folder = head, folder
        (folder / "job").mkdir()
        (self.config_text,) = tandem_configs(release).values()
        (folder / "job" / "tandem.yaml").write_text(self.config_text)
        (folder / "api-keys").write_text(KEY + "\n")
        scripts = next(m["data"] for m in of_kind(release, "ConfigMap") if "probe.py" in m["data"])
        for name, text in scripts.items():
            (folder / name).write_text(text)
        (self._container,) = (c for where, c, _ in containers(release) if where.endswith("/serve-job"))
        (self._gateway,) = (c for where, c, _ in containers(release) if where.endswith("/gateway/ray-worker"))
        (self._test,) = (c for where, c, _ in containers(release) if where.startswith("Pod/"))
        (self._ray_head,) = (c for where, c, _ in containers(release) if where.endswith("/head/ray-head"))
        self.url = f"http://127.0.0.1:{yaml.safe_load(self.config_text)['gateway']['port']}"
        self.version = "1"
        self.process: subprocess.Popen[str] | None = None

    def localised(self, command: list[str]) -> list[str]:
        """The command with this machine's files, ports and interpreter."""
        moved = {
            "python": sys.executable,
            "/etc/tandem/job": str(self._folder / "job"),
            "/etc/tandem/secrets": str(self._folder),
            "/etc/tandem/scripts": str(self._folder),
        }
        words = []
        for word in command:
            for there, here in moved.items():
                word = here if word == there else word.replace(there + "/", here + "/").replace("=" + there, "=" + here)
            words.append(f"--address={self._head.dashboard}" if word.startswith("--address=") else word)
        words = [word.replace("$(TEMPLATE)", self.version) for word in words]
        return words

    def start(self) -> None:
        command = self.localised(self._container["command"])
        with open(self._folder / "log", "w") as log:
            self.process = subprocess.Popen(
                command, env=self._head.environment, stdout=log, stderr=log, text=True, start_new_session=True
            )

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def probe(self, name: str) -> int:
        """The exit code of a probe of the gateway's container, or of the head's readiness."""
        probe = self._ray_head["readinessProbe"] if name == "head" else self._gateway[name]
        ports = {"52365": str(self._head.agent_port), "8265": self._head.dashboard.rpartition(":")[2]}
        command = [ports.get(word, word) for word in self.localised(probe["exec"]["command"])]
        return subprocess.run(command, env=self._head.environment, capture_output=True, timeout=70).returncode

    def helm_test(self) -> subprocess.CompletedProcess[str]:
        """What the pod of `helm test` runs, at this machine's address in place of the service's."""
        words = self.localised(self._test["command"])
        words[words.index("--url") + 1] = self.url
        return subprocess.run(words, capture_output=True, text=True, timeout=70)

    def stop_hook(self) -> int:
        command = self.localised(self._gateway["lifecycle"]["preStop"]["exec"]["command"])
        return subprocess.run(command, env=self._head.environment, cwd=ROOT, timeout=2 * WAIT_S).returncode

    def end(self) -> int:
        """SIGTERM, as a pod that ends gets it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)


@pytest.fixture
def job(release: list[Object], guarded_head: RayHead, tmp_path: Path) -> Iterator[ServeJob]:
    job = ServeJob(release, guarded_head, tmp_path)
    job.start()
    yield job
    if job.process is not None and job.process.poll() is None:
        job.process.kill()
        job.process.wait()


def _harness(job: ServeJob, scenario: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`tandem harness` against the job's gateway."""
    (keys,) = job.localised(["/etc/tandem/secrets/api-keys"])
    command = [sys.executable, "-m", "cluster", "harness", str(scenario), "--url", job.url, "--api-key-file", keys]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)


def _missing_figures(job: ServeJob) -> set[str]:
    """What the alerts and the dashboard ask for and this cluster does not report, but for what only a split one has and
    what only counts once something happened.
    """
    rules = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["alerts"]
    asked = asked_figures([rule["expr"] for rule in rules] + dashboard_queries())
    page = httpx.get(job.url + "/metrics", timeout=WAIT_S).text
    missing = {figure for figure in asked if not re.search(rf"^tandem:{figure}[ {{]", page, re.MULTILINE)}
    return missing - {"kv_exports_open", "request_errors_total", "transfer_streams_restarted_total"}


def test_the_rendered_serve_job_serves_is_probed_and_drains(job: ServeJob, tmp_path: Path) -> None:
    assert job.process is not None
    assert job.probe("startupProbe") == 1, "the canary passed before anything was there"
    eventually(lambda: "ready: http" in job.log() or job.process.poll() is not None, job.log, WAIT_S)  # type: ignore[union-attr]
    assert job.process.poll() is None, job.log()
    assert job.probe("startupProbe") == job.probe("livenessProbe") == job.probe("head") == 0
    assert httpx.get(job.url + "/ready", timeout=WAIT_S).status_code == 200
    assert httpx.post(job.url + "/v1/completions", json={"prompt": "x"}, timeout=WAIT_S).status_code == 401
    canary = job.helm_test()
    assert canary.returncode == 0 and "tandem-demo answers" in canary.stdout, canary.stdout + canary.stderr
    eventually(lambda: not _missing_figures(job), lambda: f"missing: {_missing_figures(job)}")  # those of a late worker
    asked = _harness(job, ROOT / "examples" / "harness" / "smoke.yaml")
    assert asked.returncode == 0 and asked.stdout.count("passed") == 2, asked.stdout + asked.stderr
    wrong = {"name": "planted", "oracle": {"kind": "file", "file": "wrong.json"}, "steps": [{"name": "a step"}]}
    (tmp_path / "planted.yaml").write_text(yaml.safe_dump(wrong))
    (tmp_path / "wrong.json").write_text(json.dumps([{"prompt": "How many digits are there?", "answer": "planted"}]))
    planted = _harness(job, tmp_path / "planted.yaml", "--html", str(tmp_path / "report.html"))
    assert planted.returncode == 1 and "20 of 20 answers are wrong" in planted.stdout, planted.stdout + planted.stderr
    report = (tmp_path / "report.html").read_text()
    assert "1 failed" in report and "20 of 20 answers are wrong" in report
    assert job.stop_hook() == 0, "draining took longer than the pod is given"
    assert job.process.wait(WAIT_S) == 0, job.log()
    assert job.probe("startupProbe") == 1, "something still answers"
    if not IS_SOAK:
        return
    job.start()  # as Kubernetes starts a container that ended
    eventually(lambda: job.probe("startupProbe") == 0, job.log, WAIT_S)
    assert job.end() == 0 and "goes on" in job.log(), job.log()
    assert job.probe("startupProbe") == 0, "nobody serves while the pod of the serve job is moved"
    job.start()
    eventually(lambda: "taking it over" in job.log(), job.log, WAIT_S)
    assert job.end() == 0 and job.probe("startupProbe") == 0, job.log()
    job.version = "2"  # a changed configuration
    job.start()
    eventually(lambda: "ready: http" in job.log(), job.log, WAIT_S)
    assert "of another version is still there: stopping it" in job.log() and job.probe("startupProbe") == 0
    assert job.stop_hook() == 0 and job.process.wait(WAIT_S) == 0, job.log()


def test_who_has_no_token_submits_nothing(guarded_head: RayHead) -> None:
    head = guarded_head
    stranger = RayHead(head.dashboard, head.agent_port, head.environment | {"RAY_AUTH_TOKEN": "0" * 64})
    done = stranger.submit("python", "-c", "print('in')", options=())
    assert done.returncode != 0 and "'in'" not in done.stdout
    assert "Unauthorized" in done.stderr or "Forbidden" in done.stderr or "token" in done.stderr.lower(), done.stderr


def test_images_are_answered_in_a_batch(guarded_head: RayHead, tmp_path: Path) -> None:
    by_image: dict[str, Any] = {q.image.name: q.answer for q in questions() if q.text == "What number is this?"}
    (tmp_path / "images" / "more").mkdir(parents=True)
    for name in by_image:
        shutil.copy(IMAGE_DIR / name, tmp_path / "images" / ("more" if name == "five.png" else "") / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    arguments = ["--model", str(MODEL_DIR), "--images", str(tmp_path / "images"), "--question", "What number is this?",
                 "--dtype", "float32", "--num-threads", "1", "--cpus-per-actor", "1"]  # fmt: skip
    command = ["python", "-m", "examples.jobs.batch_images", *arguments, "--output", str(tmp_path / "out")]
    done = guarded_head.submit(*command, options=("--runtime-env", "examples/jobs/runtime_env.yaml"))
    assert done.returncode == 1, "a broken image must show in the exit code\n" + done.stdout + done.stderr
    lines = [line for part in (tmp_path / "out").glob("*.json") for line in part.read_text().splitlines()]
    rows = {Path(row["path"]).name: row for row in map(json.loads, lines)}
    assert {name: row["answer"] for name, row in rows.items() if not row["error"]} == by_image
    assert rows.keys() - by_image.keys() == {"broken.png"} and "broken" not in rows["broken.png"]["answer"]
    assert not (tmp_path / "out.partial").exists()
    again = subprocess.run([str(BIN / "python"), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "exists" in again.stderr
