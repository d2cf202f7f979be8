"""The tandem.yaml of every ConfigMap that is for CPUs, given to `tandem serve --config` on this machine.

What the pods of a release do to it then is done here too: the canary of their probes, and the hook before they end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.demo import MODEL_DIR
from tests.e2e.serve_process import ROOT, TIMEOUT_S, serve
from tests.helm.rendering import CASES, CHART, containers, rendered, tandem_configs
from tests.profiles import IS_SOAK
from tests.tiny_text_models import make_text_model

pytestmark = pytest.mark.ray

STARTED = ("defaults", "cpu", "split", "autoscaling", "both-tracks", "text", "ports", "s3")  # of equal ones the first
EVERY_DAY = ("split",)  # tests/e2e/test_deploy.py starts that of cpu.yaml
KEY = "a-key-that-nobody-else-has"


def _configs(case: str) -> dict[str, dict[str, Any]]:
    """Those for CPUs, by the name of their ConfigMap."""
    trees = {name: yaml.safe_load(text) for name, text in tandem_configs(rendered(case)).items()}
    return {name: tree for name, tree in trees.items() if not tree["model"].get("device", "cpu").startswith("cuda")}


def _without_names(tree: dict[str, Any]) -> str:
    """What of a configuration decides how it starts."""
    model = {name: value for name, value in tree["model"].items() if name not in ("path", "served_model_name")}
    gateway = {n: value for n, value in tree["gateway"].items() if n != "port" and not n.startswith("media_")}
    return json.dumps({**tree, "model": model, "gateway": gateway}, sort_keys=True)


def test_every_configuration_for_cpus_is_started_below() -> None:
    started = {_without_names(tree) for case in STARTED for tree in _configs(case).values()}
    others = {case for case in CASES if any(_without_names(tree) not in started for tree in _configs(case).values())}
    assert others == {"scheduling"}, "a case with a configuration of its own: add it"  # two workers of each kind
    assert len(started) >= 7


@pytest.fixture
def temporary() -> Iterator[str]:
    """A folder of its own, so that `tandem stop` ends what is served here and no more; short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rc-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.parametrize("case", STARTED)
def test_a_rendered_configuration_serves_and_stops(case: str, temporary: str, tmp_path: Path, ray_token: None) -> None:
    if not IS_SOAK and case not in EVERY_DAY:
        pytest.skip("under `make soak`")
    (gateway, *_) = [c for where, c, _ in containers(rendered(case)) if where.endswith("/gateway/ray-worker")]
    keys, environment = tmp_path / "keys", os.environ | {"TMPDIR": temporary}
    keys.write_text(KEY + "\n")
    for name, tree in _configs(case).items():
        reads_text_only = "embedding" not in tree["workers"]
        model = make_text_model(tmp_path / "text", "qwen3") if reads_text_only else MODEL_DIR
        (tmp_path / "tandem.yaml").write_text(tandem_configs(rendered(case))[name])
        arguments = ["--config", str(tmp_path / "tandem.yaml"), "--model", str(model), "--api-key-file", str(keys)]
        with serve(*arguments, "--host", "127.0.0.1", "--port", "0", environment=environment) as served:
            here = {
                "python": sys.executable,
                gateway["lifecycle"]["preStop"]["exec"]["command"][-1]: str(
                    TIMEOUT_S
                ),  # a slow machine may take longer
                "/etc/tandem/scripts/probe.py": str(CHART / "files" / "probe.py"),
                "/etc/tandem/secrets/api-keys": str(keys),
                str(tree["gateway"]["port"]): served.url.rpartition(":")[2],
            }
            for command in (gateway["startupProbe"], gateway["lifecycle"]["preStop"]):
                words = [here.get(word, word) for word in command["exec"]["command"]]
                done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{name}: {words}\n{done.stdout}{done.stderr}"
            assert served.process.wait(TIMEOUT_S) == 0, "the hook returned before everything had ended"
