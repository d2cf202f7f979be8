"""The restricted Pod Security Standard, rule by rule, and that nothing refers to what is not there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.helm.rendering import CASES, CHART, Object, containers, of_kind, pod_templates, rendered

BROUGHT_ALONG = {  # secrets that the examples say somebody else makes
    "models-s3", "tandem-redis", "our-api-keys", "our-ray-token", "registry", "tandem-tls",
}  # fmt: skip
VOLUME_KINDS = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def violations(pod: Object) -> list[str]:
    """What in a pod's spec is against the standard ("restricted", and what it inherits from "baseline")."""
    spec = pod["spec"]
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    for volume in spec.get("volumes", ()):
        if not (set(volume) - {"name"}) <= VOLUME_KINDS:
            found.append(f"volume {volume['name']}")
    whole = spec.get("securityContext", {})
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        own = container.get("securityContext", {})
        checks = {
            "runs as root": own.get("runAsNonRoot", whole.get("runAsNonRoot")) is True,
            "user 0": (own.get("runAsUser", whole.get("runAsUser", 1)) or 0) > 0,
            "may gain privileges": own.get("allowPrivilegeEscalation") is False,
            "is privileged": not own.get("privileged", False),
            "keeps capabilities": own.get("capabilities") == {"drop": ["ALL"]},
            "no seccomp": own.get("seccompProfile", whole.get("seccompProfile", {})).get("type") == "RuntimeDefault",
            "host ports": not any("hostPort" in port for port in container.get("ports", ())),
        }
        found += [f"{container['name']}: {what}" for what, is_right in checks.items() if not is_right]
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_restricted(case: str) -> None:
    pods = dict(pod_templates(rendered(case)))
    assert len(pods) >= 5
    assert {where: found for where, pod in pods.items() if (found := violations(pod))} == {}


@pytest.mark.parametrize(
    "change",
    [
        {"hostNetwork": True},
        {"securityContext": {}},
        {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]},
        {"containers": [{"name": "x", "securityContext": {"allowPrivilegeEscalation": False}}]},
    ],
)
def test_the_rules_catch_what_they_are_for(change: dict[str, Any]) -> None:
    pod = next(pod for where, pod in pod_templates(rendered("defaults")) if where.endswith("/language"))
    stripped = [{**container, "securityContext": {}} for container in pod["spec"]["containers"]]
    broken = {"spec": pod["spec"] | ({"containers": stripped} if "securityContext" in change else {}) | change}
    assert violations(broken)


@pytest.mark.parametrize("case", CASES)
def test_every_container_is_bounded_and_cannot_write_its_image(case: str) -> None:
    for where, container, spec in containers(rendered(case)):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, where
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}, where
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}, where
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounts <= set(volumes), f"{where} mounts {mounts - set(volumes)}"
        for name in mounts:
            assert "sizeLimit" in volumes[name].get("emptyDir", {"sizeLimit": 0}), f"{where}: {name} may fill its node"


@pytest.mark.parametrize("case", CASES)
def test_no_pod_has_a_token_of_kubernetes_but_the_autoscaler_s(case: str) -> None:
    for cluster in of_kind(rendered(case), "RayCluster"):
        head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
        assert head["automountServiceAccountToken"] is cluster["spec"].get("enableInTreeAutoscaling", False)
    for where, pod in pod_templates(rendered(case)):
        assert where.endswith("/head") or pod["spec"]["automountServiceAccountToken"] is False, where


def _references(node: Any) -> list[tuple[str, str]]:
    """("Secret" or "ConfigMap", name) of everything that is referred to below."""
    if isinstance(node, list):
        return [found for part in node for found in _references(part)]
    if not isinstance(node, dict):
        return []
    found = []
    for key, value in node.items():
        if key == "secretKeyRef":
            found.append(("Secret", value["name"]))
        elif key in ("configMapKeyRef", "configMap"):
            found.append(("ConfigMap", value["name"]))
        elif key == "secret" or key == "secretName":
            found.append(("Secret", value["secretName"] if isinstance(value, dict) else value))
        elif key == "imagePullSecrets":
            found += [("Secret", item["name"]) for item in value]
        if key not in ("secretKeyRef", "configMapKeyRef", "configMap", "secret"):
            found += _references(value)
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_secret_and_map_that_is_referred_to_exists(case: str) -> None:
    objects = rendered(case)
    there = {(item["kind"], item["metadata"]["name"]) for item in objects}
    there |= {("Secret", name) for name in BROUGHT_ALONG}
    referred = {found for item in objects for found in _references(item)}
    assert len(referred) >= 3
    assert referred - there == set()


@pytest.mark.parametrize("case", CASES)
def test_scripts_that_are_run_are_mounted(case: str) -> None:
    objects = rendered(case)
    maps = [item["data"] for item in of_kind(objects, "ConfigMap")]
    scripts = {name: text for data in maps for name, text in data.items() if name.endswith((".py", ".sh"))}
    assert scripts.keys() == {"probe.py", "serve_job.py", "copy_model.sh"}
    for name, text in scripts.items():
        assert text.strip() == (CHART / "files" / name).read_text().strip()
    for where, container, _ in containers(objects):
        run = set(re.findall(r"/etc/tandem/scripts/(\w+\.\w+)", str(container)))
        assert run <= scripts.keys(), where
        is_mounted = any(mount["mountPath"] == "/etc/tandem/scripts" for mount in container["volumeMounts"])
        assert not run or is_mounted, where


@pytest.mark.parametrize("case", CASES)
def test_pods_are_given_the_time_that_draining_takes(case: str) -> None:
    for where, pod in pod_templates(rendered(case)):
        (main, *_) = pod["spec"]["containers"]
        hook = main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if hook:
            assert hook[:-1] == ["python", "-m", "cluster", "stop", "--timeout-s"], where
            assert pod["spec"]["terminationGracePeriodSeconds"] > int(hook[-1]) + 30, where
        assert ("gateway" in where.split("/")[-1]) == bool(hook), where


def test_generated_secrets_are_long_random_and_kept() -> None:
    made = of_kind(rendered("defaults"), "Secret")
    assert len(made) == 2
    values = [value for secret in made for value in secret["data"].values()]
    assert len(set(values)) == 2 and all(len(value) == 64 for value in values)  # 48 characters in base64
    assert all(secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for secret in made)
    assert of_kind(rendered("existing-secrets"), "Secret") == []


@pytest.mark.parametrize("case", CASES)
def test_every_pod_that_may_be_evicted_has_a_budget(case: str) -> None:
    objects = rendered(case)
    budgets = [item["spec"] for item in of_kind(objects, "PodDisruptionBudget")]
    for where, pod in pod_templates(objects):
        if where.startswith("RayCluster/"):
            labels = pod["metadata"]["labels"].items()
            assert sum(budget["selector"]["matchLabels"].items() <= labels for budget in budgets) == 1, where


@pytest.mark.parametrize("case", CASES)
def test_budgets_are_numbers_that_must_stay(case: str) -> None:
    """What Kubernetes takes for pods whose owner has no scale subresource; by maxUnavailable it would evict none."""
    objects = rendered(case)
    replicas = {"head": 1}
    for cluster in of_kind(objects, "RayCluster"):
        replicas |= {group["groupName"]: group["replicas"] for group in cluster["spec"]["workerGroupSpecs"]}
    budgets = of_kind(objects, "PodDisruptionBudget")
    assert len(budgets) >= len(replicas)
    for budget in budgets:
        assert set(budget["spec"]) == {"minAvailable", "selector"}, budget["metadata"]["name"]
        component = budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        may_go = replicas[component] - budget["spec"]["minAvailable"]
        is_kept = component == "head" and case not in ("redis", "everything")
        assert may_go == (0 if is_kept else 1), budget["metadata"]["name"]
