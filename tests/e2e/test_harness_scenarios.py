"""The shipped scenarios, on the Ray that the tests share. Each day the one whose fault no other test deals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.harness.plan import Scenario, load_scenario
from cluster.harness.report import junit
from cluster.harness.run import run_scenario
from cluster.launch import RayCluster
from tests.profiles import IS_SOAK

pytestmark = pytest.mark.ray

FOLDER = Path(__file__).parents[2] / "examples" / "harness"
EVERY_DAY = {"upgrade"}
REQUESTS = 60


def _scenario(name: str) -> Scenario:
    """As shipped, but that the shared Ray has few CPUs to give, and that some days are shorter than others."""
    scenario = load_scenario(FOLDER / f"{name}.yaml")
    config: dict[str, Any] = scenario.topology.config
    config["workers"] = config["workers"] | {"num_cpus": 0.1}
    if IS_SOAK:
        return scenario
    steps = [
        step.model_copy(update={"load": step.load.model_copy(update={"requests": min(step.load.requests, REQUESTS)})})
        for step in scenario.steps
    ]
    return scenario.model_copy(update={"steps": steps})


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_shipped_scenario_passes(name: str, ray_cluster: RayCluster) -> None:
    if not IS_SOAK and name not in EVERY_DAY:
        pytest.skip("under `make soak`; tests/e2e/test_cluster_faults.py deals its faults every day")
    result = run_scenario(_scenario(name), on_status=lambda text: None)
    assert result.has_passed, junit([result])
    assert all(step.samples for step in result.steps)
    assert any(step.fault for step in result.steps) or name == "smoke"
