"""Writes values.schema.json and README.md from values.yaml and from Tandem's own configuration classes.

`python helm/generate.py` from the repository's root. A value's type and default are what values.yaml says, its meaning
the comment above it; what that cannot tell (choices, ranges, free maps) stands in the tables here. The sections below
`config` are those of ClusterConfig, so that a typo is found when the chart is rendered and not when a pod starts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # run as a script, this folder heads the path

from cluster.config import ClusterConfig  # noqa: E402
from language_worker.errors import EngineError  # noqa: E402

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
LABEL = {"type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$"}
LABELS = {"type": "object", "additionalProperties": LABEL}
OBJECTS = {"type": "array", "items": {"type": "object"}}
NAMES = {"type": "array", "items": {"type": "string"}}
FREE = {"type": "object"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
SOME_PORTS = {"type": "array", "items": PORT, "minItems": 1}  # none would be all
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
AMOUNT = {"anyOf": [QUANTITY, {"type": "number"}]}
RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {name: {"type": "object", "additionalProperties": AMOUNT} for name in ("requests", "limits")},
}
DIGEST = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
IMAGE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {**{name: {"type": "string"} for name in ("repository", "tag")}, "digest": DIGEST},
}
NAME = {"type": "string", "pattern": "^([a-z]([a-z0-9-]*[a-z0-9])?)?$"}
CIDR = {"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]+$"}
OFFERS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {name: {"type": "integer", "minimum": 1} for name in ("embedding", "language", "prefill", "decode")},
}
OF_A_TRACK = (  # what two clusters side by side may differ in; the rest is of the whole release
    "image", "imagePullSecrets", "model", "config", "ray", "transfer", "head", "gateway", "workerGroups",
    "workerDefaults", "serveJob", "autoscaling", "gcsFaultTolerance",
)  # fmt: skip
TRACK = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "enabled": {"type": "boolean"},
        "overrides": {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: {"$ref": f"#/properties/{name}"} for name in OF_A_TRACK},
        },
    },
}
LEAST_MINUS_ONE = {"type": "integer", "minimum": -1}

PORTS = (
    "port", "gcs", "dashboard", "agent", "ray.ports.metrics", "firstNode", "firstWorker", "lastWorker", "firstPort",
    "lastPort",
)  # fmt: skip
MAPS = ("annotations", "podAnnotations")
SECRET_KEY = {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"}
SECRET = {"type": "string", "pattern": "^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$"}
LISTS = (
    "imagePullSecrets", "tolerations", "topologySpreadConstraints", "extraEnv", "extraVolumes", "extraVolumeMounts",
    "tls", "parentRefs", "clients", "monitoring", "jobs", "extraEgress",
)  # fmt: skip
# dotted value, or the last part of it -> schema, where the default does not tell it
SCHEMAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(PORTS, PORT),
    **dict.fromkeys(MAPS, STRINGS),
    **dict.fromkeys(("commonLabels", "labels", "nodeSelector"), LABELS),
    **dict.fromkeys(("existingSecret", "claimName"), SECRET),
    **dict.fromkeys(("apiServerPorts", "dnsPorts"), SOME_PORTS),
    **dict.fromkeys(("auth.api.key", "auth.ray.key"), SECRET_KEY),
    "image.repository": {"type": "string", "minLength": 1},
    "dns": OBJECTS | {"minItems": 1},
    **dict.fromkeys(LISTS, OBJECTS),
    **dict.fromkeys(("sharedMemory", "scratch", "sizeLimit"), QUANTITY),
    **dict.fromkeys(("gpus", "replicas", "maxUnavailable"), COUNT),
    **dict.fromkeys(("minReplicas", "maxReplicas", "workerDefaults.idleSeconds"), LEAST_MINUS_ONE),
    **dict.fromkeys(("runAsUser", "runAsGroup", "drainSeconds"), POSITIVE),
    **dict.fromkeys(("head.image", "gateway.image", "workerDefaults.image"), IMAGE),
    **dict.fromkeys(("blueGreen.blue", "blueGreen.green"), TRACK),
    **dict.fromkeys(("hosts", "hostnames"), NAMES),
    **dict.fromkeys(("nameOverride", "fullnameOverride"), NAME),
    **dict.fromkeys(("cidr", "apiServerCidr"), CIDR),
    **dict.fromkeys(("timeoutSeconds", "idleSeconds"), POSITIVE),
    "digest": DIGEST,
    "model.path": {"type": "string", "pattern": "^(/.*)?$"},
    "endpoint": {"type": "string", "pattern": "^(https?://.+)?$"},
    "redisAddress": {"type": "string", "pattern": "^(.+:[0-9]+)?$"},
    "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
    "affinity": FREE,
    "resources": RESOURCES,
    "offers": OFFERS,
    "startSeconds": {"type": "integer", "minimum": 10},
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "model.source": {"enum": ["image", "pvc", "s3"]},
    "service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "blueGreen.active": {"enum": ["blue", "green"]},
    "upgradeStrategy": {"enum": ["", "Recreate", "None"]},
    "upscalingMode": {"enum": ["Default", "Conservative", "Aggressive"]},
}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
RESERVED = ("head", "gateway", "serve-job", "test")


def schema(values: dict[str, Any]) -> dict[str, Any]:
    """Of the whole values.yaml."""
    root = _schema_of("", values)
    group = root["properties"]["workerDefaults"]
    root["properties"]["workerGroups"] = {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$", "not": {"enum": [*RESERVED]}},
        "additionalProperties": group | {"type": ["object", "null"]},
    }
    root["properties"]["config"] = _config_schema()
    root["properties"]["global"] = FREE
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the Tandem chart", **root}


def _schema_of(path: str, value: Any) -> dict[str, Any]:
    known = SCHEMAS.get(path) or SCHEMAS.get(path.rpartition(".")[2], {})
    is_section = isinstance(value, dict) and known.get("type") != "object"  # shares its name with a plain value
    if known and not is_section:
        return known
    if is_section:
        properties = {name: _schema_of(f"{path}.{name}".lstrip("."), part) for name, part in value.items()}
        return {"type": "object", "additionalProperties": False, "properties": properties}
    return {"type": KINDS[type(value)]}


def _config_schema() -> dict[str, Any]:
    """Of what `tandem serve --config` reads, section by section."""
    sections = {}
    for section in dataclasses.fields(ClusterConfig):
        kind = typing.cast(Any, section.default_factory)
        hints = typing.get_type_hints(kind)
        settings = {
            f.name: pydantic.TypeAdapter(hints[f.name]).json_schema() | _bounds(kind, f.name, hints[f.name])
            for f in dataclasses.fields(kind)
        }
        sections[section.name] = {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": settings,
        }
    return {"type": "object", "additionalProperties": False, "properties": sections}


def _bounds(section: Any, name: str, hint: Any) -> dict[str, Any]:
    """The least number that the section's own checks let through, where they refuse what is one less."""
    kinds = {hint, *typing.get_args(hint)} & {int, float}
    if not kinds:
        return {}
    least = next((value for value in (-2, -1, 0) if _is_accepted(section, name, value)), 1)
    if least == 1 and float in kinds:
        return {"exclusiveMinimum": 0}
    return {"minimum": least} if least > -2 else {}


def _is_accepted(section: Any, name: str, value: int) -> bool:
    try:
        section(**{name: value})
    except (ValueError, EngineError):
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Row:
    """A value with its default and its comment."""

    name: str
    default: str
    text: str


def rows(text: str) -> Iterator[Row]:
    """Every value that has a `# --` comment; a comment goes on over the lines that follow it."""
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        stripped = line.strip()
        if stripped.startswith("# --"):
            comment = [stripped.removeprefix("# --").strip()]
        elif stripped.startswith("#") and comment:
            comment.append(stripped.lstrip("# "))
        elif found := re.match(r"^( *)([A-Za-z0-9_]+):(.*)$", line):
            indent = len(found[1])
            parents = [parent for parent in parents if parent[0] < indent]
            parents.append((indent, found[2]))
            if comment:
                yield Row(".".join(name for _, name in parents), _default(lines[number:], found[3]), " ".join(comment))
            comment = []
        elif not stripped:
            comment = []


def _default(lines: list[str], first: str) -> str:
    """The value as it is written; nothing for a map whose values follow one by one."""
    if first.strip():
        return first.strip()
    indent = len(lines[0]) - len(lines[0].lstrip())
    block = []
    for line in lines[1:]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        block.append(line)
    if any(line.lstrip().startswith("# --") for line in block):
        return ""
    return json.dumps(yaml.safe_load("\n".join(block)))


def readme(text: str) -> str:
    """README.md.tpl with the table of values."""
    table = ["| value | default | what it does |", "|---|---|---|"]
    for row in rows(text):
        default = f"`{row.default}`" if row.default else ""
        table.append(
            "| `" + row.name + "` | " + default.replace("|", "\\|") + " | " + row.text.replace("|", "\\|") + " |"
        )
    return (FOLDER / "README.md.tpl").read_text(encoding="utf-8").replace("{{values}}", "\n".join(table))


def files() -> dict[str, str]:
    """What this writes, by name."""
    text = (FOLDER / "values.yaml").read_text(encoding="utf-8")
    return {"values.schema.json": json.dumps(schema(yaml.safe_load(text)), indent=1) + "\n", "README.md": readme(text)}


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        print(f"wrote {FOLDER / name}")
