"""The Dockerfile without docker: a linter's view, and that what it copies is there and enough to build the wheel."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from cluster.cli.parser import build_parser
from tests.helm.rendering import ROOT, containers, of_kind, rendered

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
FINAL_STAGES = ("cpu", "gpu")


def _stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, arguments) of each stage, those of the stages below it first."""
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in LINES:
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            below, _, name = arguments.split()
            current = stages[name] = list(stages.get(below, ()))
        else:
            current.append((instruction, arguments.strip()))
    return stages


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stage", FINAL_STAGES)
def test_images_are_pinned_and_run_as_nobody_special(stage: str) -> None:
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-\w+$", TEXT, re.MULTILINE)
    steps = _stages()[stage]
    assert [arguments for name, arguments in steps if name == "USER"] == ["1000:1000"]
    for name, arguments in steps:
        if name == "RUN" and "pip install" in arguments:
            assert "--constraint constraints.txt" in arguments, arguments
    (command,) = [arguments for name, arguments in steps if name == "CMD"]
    words = shlex.split(command.strip("[]").replace(",", " "))
    assert words[0] == "tandem" and build_parser().parse_args(words[1:]).model == "/opt/tandem/demo-model"


@pytest.mark.parametrize("stage", FINAL_STAGES)
def test_images_have_what_documented_jobs_import(stage: str) -> None:
    """A pod cannot fetch what is missing: its file system is read-only and its network closed."""
    (wheel,) = [arguments for name, arguments in _stages()[stage] if name == "RUN" and "/wheels/*.whl" in arguments]
    assert "[data]" in wheel
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.split("[<>=]", text)[0] for text in extras["data"]} == {"pandas", "pyarrow"}


def test_an_image_asks_for_no_devices_of_its_own() -> None:
    """With NVIDIA's runtime it would be given them also where its pod asked for none."""
    settings = [arguments for stage in FINAL_STAGES for name, arguments in _stages()[stage] if name == "ENV"]
    assert settings and not any("VISIBLE_DEVICES" in setting for setting in settings)


def test_the_model_of_the_chart_s_defaults_is_in_the_images() -> None:
    (copied,) = {arguments for _, arguments in _stages()["cpu"] if arguments.endswith("demo-model")}
    assert (ROOT / copied.split()[0] / "config.json").is_file()
    assert "/opt/tandem/demo-model" in str(rendered("defaults"))


def test_the_chart_names_the_versions_that_the_images_have() -> None:
    chart = yaml.safe_load((ROOT / "helm" / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
    (cluster,) = of_kind(rendered("defaults"), "RayCluster")
    assert f"ray=={cluster['spec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()


def test_containers_of_the_chart_start_programs_that_the_images_have() -> None:
    for where, container, _ in containers(rendered("defaults")):
        if "command" in container:
            assert container["command"][0] == "python", where


def test_what_is_copied_is_there_and_makes_the_wheel(tmp_path: Path) -> None:
    listed = set((ROOT / ".dockerignore").read_text().split("\n"))
    source = tmp_path / "source"
    for name, arguments in _stages()["wheel"]:
        if name == "COPY":
            *names, target = arguments.split()
            for part in names:
                assert f"!{part}" in listed, f"{part} is copied and ignored"
                if (ROOT / part).is_dir():
                    shutil.copytree(ROOT / part, source / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    source.mkdir(exist_ok=True)
                    shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cluster").rglob("*.py")}
    assert code <= inside and "cluster/demo/model/model.safetensors" in inside
