"""The schema by which RayClusters are judged (`schemas/`) lets no mistake through."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helm.kuberay_schema import DEFINITION, faults
from tests.helm.rendering import Object, of_kind, rendered

# Maps whose keys are anybody's choice.
FREE = {"annotations", "labels", "limits", "matchLabels", "nodeSelector", "rayStartParams", "requests"}
WORKER = "spec.workerGroupSpecs.1"
TYPOS = {  # where -> a field there, misspelt
    "spec": ("rayVersion", "rayversion"),
    "spec.autoscalerOptions": ("idleTimeoutSeconds", "idleTimeoutSecond"),
    "spec.autoscalerOptions.resources": ("limits", "limit"),
    "spec.autoscalerOptions.securityContext": ("capabilities", "capability"),
    "spec.gcsFaultToleranceOptions": ("redisPassword", "redisPasword"),
    "spec.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef": ("name", "nam"),
    "spec.headGroupSpec": ("serviceType", "servicetype"),
    "spec.headGroupSpec.template.metadata": ("labels", "label"),
    "spec.headGroupSpec.template.spec.containers.0.livenessProbe": ("periodSeconds", "periodSecond"),
    WORKER: ("maxReplicas", "maxReplica"),
    f"{WORKER}.template.spec.volumes.0.emptyDir": ("sizeLimit", "sizelimit"),
}
WRONG = {  # where -> what may not stand there
    "apiVersion": "ray.io/v1alpha1",
    "kind": "RayService",
    "metadata.labels.team": 7,
    "spec.enableInTreeAutoscaling": "true",
    "spec.managedBy": "somebody",
    "spec.upgradeStrategy": {"type": "Rolling"},
    "spec.autoscalerOptions.upscalingMode": "default",
    "spec.autoscalerOptions.version": "v3",
    "spec.autoscalerOptions.env.0.value": 1,
    "spec.gcsFaultToleranceOptions.redisAddress": 6379,
    "spec.headGroupSpec.rayStartParams.num-cpus": 0,
    "spec.headGroupSpec.template.metadata.creationTimestamp": None,  # of metadata, KubeRay keeps five fields
    "spec.headGroupSpec.template.spec.containers.0.ports.0.containerPort": "6379",
    "spec.workerGroupSpecs": {},
    f"{WORKER}.replicas": 2**31,
    f"{WORKER}.minReplicas": "1",
    f"{WORKER}.idleTimeoutSeconds": 1.5,
    f"{WORKER}.scaleStrategy": {"workersToDelete": "all"},
}
REQUIRED = (
    "apiVersion",
    "metadata",
    "spec",
    "spec.headGroupSpec",
    "spec.headGroupSpec.template",
    "spec.headGroupSpec.template.spec.containers",
    "spec.autoscalerOptions.env.0.name",
    "spec.gcsFaultToleranceOptions.redisAddress",
    "spec.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.key",
    f"{WORKER}.groupName",
    f"{WORKER}.minReplicas",
    f"{WORKER}.maxReplicas",
    f"{WORKER}.template",
    f"{WORKER}.template.spec.volumes.0.name",
)


def _cluster() -> Object:
    """With every option that the chart has, and the groups of the gateway and of one role."""
    (cluster,) = of_kind(rendered("everything"), "RayCluster")
    cluster = copy.deepcopy(cluster)
    del cluster["spec"]["workerGroupSpecs"][2:]
    return cluster


def _at(tree: Any, place: str) -> Any:
    for step in place.split("."):
        tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    return tree


def _parent(cluster: Object, place: str) -> tuple[Any, str]:
    above, _, name = place.rpartition(".")
    return (_at(cluster, above) if above else cluster), name


@pytest.mark.parametrize("place", TYPOS)
def test_a_typo_is_refused_with_its_place(place: str) -> None:
    cluster = _cluster()
    name, typo = TYPOS[place]
    parent = _at(cluster, place)
    parent[typo] = parent.pop(name)
    steps = (f"[{step}]" if step.isdigit() else f".{step}" for step in place.split("."))
    unknown = f"${''.join(steps)}: Additional properties are not allowed ('{typo}' was unexpected)"
    assert unknown in faults(cluster)


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_value_is_refused(place: str) -> None:
    cluster = _cluster()
    parent, name = _parent(cluster, place)
    parent[name] = WRONG[place]
    assert len(faults(cluster)) == 1


@pytest.mark.parametrize("place", REQUIRED)
def test_a_missing_field_is_refused_by_name(place: str) -> None:
    cluster = _cluster()
    parent, name = _parent(cluster, place)
    del parent[name]
    (fault,) = faults(cluster)
    assert fault.endswith(f": '{name}' is a required property")


def _fields(tree: Any, place: str = "") -> Iterator[str]:
    """Every place of a field with a name of KubeRay's or Kubernetes' own, below any list once."""
    if isinstance(tree, list):
        for number, part in enumerate(tree):
            yield from _fields(part, f"{place}.{number}")
    elif isinstance(tree, dict) and place.rpartition(".")[2] not in FREE:
        for name, part in tree.items():
            yield f"{place}.{name}".lstrip(".")
            yield from _fields(part, f"{place}.{name}".lstrip("."))


def test_no_field_that_the_chart_writes_may_be_called_otherwise() -> None:
    """One at a time, each kind of field once: what the schema left open anywhere would show here."""
    places = {tuple(step for step in place.split(".") if not step.isdigit()): place for place in _fields(_cluster())}
    assert len(places) > 100
    accepted = []
    for place in places.values():
        cluster = _cluster()
        parent, name = _parent(cluster, place)
        parent[f"{name}X"] = parent.pop(name)
        if not any(f"'{name}X' was unexpected" in fault for fault in faults(cluster)):
            accepted.append(place)
    assert accepted == []


def test_no_object_of_the_definition_is_open() -> None:
    """Also those of fields that the chart does not write yet."""

    def objects(tree: Any) -> Iterator[Object]:
        if isinstance(tree, dict) and isinstance(tree.get("properties"), dict):
            yield tree
        for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            yield from objects(part)

    found = list(objects(json.loads(DEFINITION.read_text(encoding="utf-8"))))
    assert len(found) == 13
    assert all(part["type"] == "object" and part["additionalProperties"] is False for part in found)
    assert all(set(part.get("required", ())) <= set(part["properties"]) for part in found)
