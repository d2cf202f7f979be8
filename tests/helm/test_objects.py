"""Whatever is set, what helm renders are objects that Kubernetes and KubeRay take."""

from __future__ import annotations

import json
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from cluster.metrics import LEDGER
from tests.helm.kuberay_schema import faults
from tests.helm.rendering import (
    CASES,
    CHART,
    KUBERNETES,
    asked_figures,
    dashboard_queries,
    helm,
    of_kind,
    pod_templates,
    render,
    rendered,
    template,
)

PACKAGES = ("cluster", "language_worker", "embedding_worker", "transfer")
OPERATORS = {  # kind -> fields of the spec that its operator knows and the chart uses
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
    "HTTPRoute": {"parentRefs", "hostnames", "rules"},
}


@pytest.mark.parametrize("case", CASES)
def test_lint_finds_nothing(case: str) -> None:
    done = helm("lint", "--strict", str(CHART), *CASES[case])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("case", CASES)
def test_every_object_fits_its_schema(case: str) -> None:
    objects = rendered(case)
    kinds = {item["kind"] for item in objects}
    assert {"RayCluster", "Deployment", "ConfigMap", "Service", "PodDisruptionBudget", "Pod"} <= kinds
    for item in objects:
        if item["kind"] == "RayCluster":
            assert faults(item) == []
        elif item["kind"] in OPERATORS:
            assert set(item["spec"]) <= OPERATORS[item["kind"]], item
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_large_numbers_are_written_as_integers() -> None:
    """Helm reads numbers as floating-point ones, and writes a user's, as OpenShift gives them, as 1.00065e+09."""
    values = {
        "security": {"runAsUser": 1000650000, "runAsGroup": 1000650000},
        "gateway": {"drainSeconds": 1200000},
        "autoscaling": {"enabled": True, "idleSeconds": 2000000},
        "workerDefaults": {"idleSeconds": 3000000},
        "helmTest": {"timeoutSeconds": 4000000},
    }
    done = template("--values", "-", input=json.dumps(values))
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"[0-9]e[+][0-9]+", done.stdout)
    (cluster,) = of_kind([item for item in yaml.safe_load_all(done.stdout) if item], "RayCluster")
    assert faults(cluster) == []
    assert cluster["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] == 1000650000


@pytest.mark.parametrize("case", CASES)
def test_names_are_unique_and_short_enough(case: str) -> None:
    objects = rendered(case)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 58 for _, name in names), "KubeRay makes longer names of a RayCluster's"
    for cluster in of_kind(objects, "RayCluster"):  # its schema leaves the name open, its operator does not
        assert re.fullmatch("[a-z]([a-z0-9-]{0,39}[a-z0-9])?", cluster["metadata"]["name"])


@pytest.mark.parametrize("name", ["a-release.of-2.0", "a" * 53, "tandem." + "b" * 46])
def test_any_name_of_a_release_makes_names_that_kuberay_and_services_take(name: str) -> None:
    """KubeRay calls the head's service after the cluster; what is longer than 50 characters it cuts from the front."""
    done = helm("template", name, str(CHART), "--kube-version", KUBERNETES, *CASES["both-tracks"])
    assert done.returncode == 0, done.stderr
    objects = [item for item in yaml.safe_load_all(done.stdout) if item]
    deployments = {item["metadata"]["name"]: str(item["spec"]) for item in of_kind(objects, "Deployment")}
    for cluster in of_kind(objects, "RayCluster"):
        head = f"{cluster['metadata']['name']}-head-svc"
        assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", head) and len(head) <= 50, head
        assert f"--address=http://{head}:8265" in deployments[f"{cluster['metadata']['name']}-serve"]
    for service in of_kind(objects, "Service"):
        assert re.fullmatch("[a-z]([a-z0-9-]{0,61}[a-z0-9])?", service["metadata"]["name"])


def test_common_labels_are_on_every_object_and_every_pod() -> None:
    objects = rendered("scheduling")
    assert all(item["metadata"]["labels"]["team"] == "inference" for item in objects)
    for where, pod in pod_templates(objects):
        assert pod["metadata"]["labels"]["team"] == "inference", where


@pytest.mark.parametrize("case", CASES)
def test_every_node_says_how_many_gpus_it_has(case: str) -> None:
    """Also none: untold, Ray offers whatever the container sees, which on a node with GPUs may be all of them."""
    for cluster in of_kind(rendered(case), "RayCluster"):
        for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert group["rayStartParams"]["num-gpus"] == str(limits.get("nvidia.com/gpu", 0))


def test_the_state_in_redis_ends_with_its_cluster() -> None:
    """KubeRay names it after the cluster's UID, and removes it with a pod made of the head's, when the chart's maps are
    gone: a cluster of the same name would else begin with the state of one that is gone.
    """
    (cluster,) = of_kind(rendered("redis"), "RayCluster")
    assert "externalStorageNamespace" not in cluster["spec"]["gcsFaultToleranceOptions"]
    pods = dict(pod_templates([cluster]))
    for where, pod in pods.items():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["scripts"]["configMap"].get("optional", False) is where.endswith("/head"), where


@pytest.mark.parametrize("case", ["defaults", "gpu", "colocated", "autoscaling"])
def test_ray_s_autoscaler_understands_the_groups(case: str) -> None:
    """Its own reader says what each group offers and how many pods there may be."""
    for cluster in of_kind(rendered(case), "RayCluster"):
        cluster = json.loads(json.dumps(cluster))
        cluster["metadata"]["namespace"] = "serving"
        read = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
        groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
        offered: dict[str, int] = {}
        for name, group in groups.items():
            kind: dict[str, Any] = read[name]
            assert kind["min_workers"] == group["minReplicas"] and kind["max_workers"] == group["maxReplicas"]
            for resource, count in kind["resources"].items():
                if resource.startswith("tandem-"):
                    offered[resource] = offered.get(resource, 0) + count * group["replicas"]
            if case == "gpu" and name != "gateway":
                assert kind["resources"]["GPU"] == 1
            patience_s = 1800 if (case, name) == ("autoscaling", "language") else None
            assert kind.get("idle_timeout_s") == patience_s
        assert offered["tandem-gateway"] == offered["tandem-serve"] == 1
        assert offered["tandem-language"] == {"defaults": 1, "gpu": 2, "colocated": 2, "autoscaling": 4}[case]


def test_idle_times_and_upgrades_are_only_written_where_kuberay_takes_them() -> None:
    """It refuses a group's idle time without the autoscaler, and knows upgrades since 1.6 only."""
    (cluster,) = of_kind(rendered("digest"), "RayCluster")
    assert cluster["spec"]["upgradeStrategy"] == {"type": "Recreate"}
    (cluster,) = of_kind(render("--set", "workerGroups.language.idleSeconds=60"), "RayCluster")
    assert "upgradeStrategy" not in cluster["spec"]
    assert all("idleTimeoutSeconds" not in group for group in cluster["spec"]["workerGroupSpecs"])


def test_every_alert_has_a_runbook_and_asks_for_figures_that_exist() -> None:
    (rule,) = of_kind(rendered("monitoring"), "PrometheusRule")
    page = (CHART.parent / "docs" / "operating.md").read_text(encoding="utf-8")
    source = "".join(path.read_text() for name in PACKAGES for path in (CHART.parent / name).rglob("*.py"))
    alerts = rule["spec"]["groups"][0]["rules"]
    assert len(alerts) >= 6
    for alert in alerts:
        assert f"### {alert['alert']}\n" in page
        assert alert["annotations"]["runbook_url"] == f"docs/operating.md#{alert['alert'].lower()}"
    figures = asked_figures([alert["expr"] for alert in alerts] + dashboard_queries())
    assert len(figures) >= 20
    for figure in figures:
        name = re.sub(r"_(total|bucket)$", "", figure)
        assert f'"{name}' in source, f"nobody reports {figure}"


def test_whatever_is_left_behind_raises_the_alarm() -> None:
    """By names, each whole: a sum of figures that not every kind of worker reports would leave workers out."""
    (rule,) = of_kind(rendered("monitoring"), "PrometheusRule")
    (alert,) = [alert for alert in rule["spec"]["groups"][0]["rules"] if alert["alert"] == "TandemLeak"]
    idle, held = alert["expr"].split(" and ")
    (pattern,) = re.findall(r'^sum\(\{__name__=~"(.*)"\}\) > 0$', held)
    assert all(re.fullmatch(pattern, f"tandem:{name}") for name in LEDGER), pattern
    assert asked_figures([held]) == set(LEDGER)
    assert asked_figures([idle]) == {"num_requests_running", "num_requests_waiting"}
    assert any(asked_figures([query]) == set(LEDGER) for query in dashboard_queries())
    page = (CHART.parent / "docs" / "operating.md").read_text(encoding="utf-8")
    assert all(f"`tandem:{name}`" in page for name in LEDGER)
