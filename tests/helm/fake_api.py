"""A Kubernetes API in memory, as far as helm uses it: discovery, and objects made, read, changed and deleted.

Objects are kept as they were sent; nothing acts on them. A patch is merged (RFC 7386), which for what helm sends here
is what the real server would end up with, but for lists, which are replaced.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "secrets": "Secret", "configmaps": "ConfigMap", "services": "Service", "pods": "Pod", "namespaces": "Namespace",
    },
    "apps/v1": {"deployments": "Deployment"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy", "ingresses": "Ingress"},
    "ray.io/v1": {"rayclusters": "RayCluster"},
}  # fmt: skip


class FakeApi:
    """url: where it listens. objects: (plural, name) -> object, of one namespace."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}

    def write_kubeconfig(self, path: Path) -> None:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
            "clusters": [{"name": "k", "cluster": {"server": self.url}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "serving"}}],
        }  # fmt: skip
        path.write_text(json.dumps(config))

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        """Status and object."""
        parts = urlsplit(url)
        path = [part for part in parts.path.split("/") if part]
        if (found := _discovery(path)) is not None:
            return 200, found
        group_length = 2 if path[0] == "api" else 3
        version, rest = "/".join(path[1:group_length]), path[group_length:]
        rest = rest[2:] if rest[:1] == ["namespaces"] and len(rest) > 2 else rest
        plural, name = rest[0], rest[1] if len(rest) > 1 else ""
        if method == "POST":
            name = body["metadata"]["name"]
            if (plural, name) in self.objects:
                return 409, _status(409, "AlreadyExists")
            self.objects[plural, name] = _stamped(body)
            return 201, self.objects[plural, name]
        if not name:
            selector = parse_qs(parts.query).get("labelSelector", [""])[0]
            items = [o for (p, _), o in sorted(self.objects.items()) if p == plural and _matches(o, selector)]
            return 200, {"kind": f"{KINDS[version][plural]}List", "apiVersion": version, "metadata": {}, "items": items}
        if (plural, name) not in self.objects:
            return 404, _status(404, "NotFound")
        if method == "DELETE":
            return 200, self.objects.pop((plural, name))
        if method == "PUT":
            self.objects[plural, name] = _stamped(body)
        elif method == "PATCH":
            self.objects[plural, name] = _merged(self.objects[plural, name], body)
        return 200, self.objects[plural, name]


def _discovery(path: list[str]) -> Any:
    groups = [version.split("/") for version in KINDS if "/" in version]
    if path == ["version"]:
        return {"major": "1", "minor": "30", "gitVersion": "v1.30.0"}
    if path == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == ["apis"]:
        named = [{"groupVersion": f"{group}/{version}", "version": version} for group, version in groups]
        entries = [
            {"name": group, "versions": [entry], "preferredVersion": entry}
            for (group, _), entry in zip(groups, named, strict=True)
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": entries}
    version = "/".join(path[1:])
    if version in KINDS:
        verbs = ["create", "delete", "get", "list", "patch", "update"]
        resources = [
            {"name": plural, "kind": kind, "namespaced": plural != "namespaces", "singularName": "", "verbs": verbs}
            for plural, kind in KINDS[version].items()
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
    return None


def _stamped(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "metadata": {"namespace": "serving", "uid": "1", "resourceVersion": "1", **body["metadata"]}}


def _status(code: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "code": code,
        "message": reason,
    }


def _matches(item: dict[str, Any], selector: str) -> bool:
    labels = item["metadata"].get("labels", {})
    return all(labels.get(pair.split("=")[0]) == pair.split("=")[1] for pair in selector.split(",") if pair)


def _merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict) or not isinstance(target, dict):
        return patch
    merged = {key: value for key, value in target.items() if patch.get(key, value) is not None}
    for key, value in patch.items():
        if value is not None and not key.startswith("$"):
            merged[key] = _merged(merged.get(key, {}), value)
    return merged


@contextmanager
def fake_api() -> Iterator[FakeApi]:
    """Serving until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length) or b"null")
            status, answer = api.answer(self.command, self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        api = FakeApi(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()
