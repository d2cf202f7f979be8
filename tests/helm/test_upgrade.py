"""helm install, upgrade, rollback and uninstall against an API in memory: generated secrets outlive all of them."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.fake_api import FakeApi, fake_api
from tests.helm.rendering import CHART, helm

SECRETS = ("release-tandem-api", "release-tandem-ray")


class Release:
    """helm on one release."""

    def __init__(self, api: FakeApi, folder: Path) -> None:
        self.api = api
        api.write_kubeconfig(folder / "kubeconfig")
        self._environment = os.environ | {
            "KUBECONFIG": str(folder / "kubeconfig"),
            "HELM_CACHE_HOME": str(folder / "cache"),
            "HELM_CONFIG_HOME": str(folder / "config"),
            "HELM_DATA_HOME": str(folder / "data"),
        }

    def helm(self, *arguments: str) -> str:
        done = helm(*arguments, "--namespace", "serving", env=self._environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, command: str, *arguments: str) -> str:
        return self.helm(command, "release", str(CHART), "--disable-openapi-validation", *arguments)

    def secrets(self) -> dict[str, dict[str, str]]:
        return {name: self.api.objects["secrets", name]["data"] for name in SECRETS}

    def deployment(self, track: str = "") -> dict[str, Any]:
        found: dict[str, Any] = self.api.objects["deployments", f"release-tandem{track}-serve"]
        return found

    def config(self, track: str = "") -> dict[str, Any]:
        data = self.api.objects["configmaps", f"release-tandem{track}-config"]["data"]
        return dict(yaml.safe_load(data["tandem.yaml"]))


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    with fake_api() as api:
        yield Release(api, tmp_path)


def _checksum(deployment: dict[str, Any]) -> str:
    return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"])


def test_secrets_are_made_once_and_kept(release: Release) -> None:
    notes = release.apply("install")
    first = release.secrets()
    assert all(len(base64.b64decode(value)) == 48 for data in first.values() for value in data.values())
    assert "helm test release --namespace serving" in notes and "get secret release-tandem-api" in notes
    before = release.deployment()
    release.apply("upgrade", "--set", "config.language.max_num_seqs=16")
    assert release.secrets() == first, "an upgrade changed what clients and nodes hold"
    assert release.config()["language"]["max_num_seqs"] == 16
    assert _checksum(release.deployment()) != _checksum(before), "the serve job would not start again"
    release.helm("rollback", "release", "1")
    assert release.secrets() == first and "language" not in release.config()
    release.helm("uninstall", "release")
    assert release.secrets() == first, "they are kept for the next installation"
    assert not any(plural == "rayclusters" for plural, _ in release.api.objects)
    release.apply("install")
    assert release.secrets() == first, "who installs again under the same name meets other keys"


def test_an_upgrade_that_changes_nothing_restarts_nothing(release: Release) -> None:
    release.apply("install")
    before = dict(release.api.objects)
    release.apply("upgrade")
    changed = {key for key, value in release.api.objects.items() if before.get(key) != value}
    assert all(plural == "secrets" and "helm.release" in name for plural, name in changed), changed


def test_blue_and_green_change_places_and_keep_their_secrets(release: Release) -> None:
    def step(**settings: str) -> None:
        values = [f"blueGreen.{name.replace('_', '.')}={value}" for name, value in settings.items()]
        example = f"{CHART}/examples/blue-green.yaml"
        release.apply("upgrade", "--install", "--values", example, *(("--set", ",".join(values)) if values else ()))

    def active() -> str:
        return str(release.api.objects["services", "release-tandem"]["spec"]["selector"]["tandem/track"])

    step()
    secrets, blue = release.secrets(), release.api.objects["rayclusters", "release-tandem-blue"]
    step(green_enabled="true")
    assert active() == "blue" and release.config("-green")["language"]["max_num_seqs"] == 128
    assert release.api.objects["rayclusters", "release-tandem-blue"] == blue, "what serves was touched"
    step(green_enabled="true", active="green")
    assert active() == "green" and release.api.objects["rayclusters", "release-tandem-blue"] == blue
    step(green_enabled="true", active="green", blue_enabled="false")
    names = {name for plural, name in release.api.objects if plural == "rayclusters"}
    assert names == {"release-tandem-green"} and release.secrets() == secrets
