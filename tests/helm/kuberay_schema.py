"""Judges a RayCluster as the API server would that has KubeRay's definition of it, and refuses what it would drop.

The definition is `schemas/raycluster.ray.io_v1.json`; its source and version stand in README.md there. Types of
Kubernetes in it, such as pod specs, are references (`kubernetes:#/$defs/NAME`) to the strict definitions that
kubernetes-validate ships.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jsonschema
import referencing
from kubernetes_validate.utils import schema_contents
from referencing.jsonschema import DRAFT202012

from tests.helm.rendering import KUBERNETES, Object

DEFINITION = Path(__file__).resolve().parent / "schemas" / "raycluster.ray.io_v1.json"


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    definition = json.loads(DEFINITION.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(definition)
    name = f"kubernetes-json-schema/v{KUBERNETES}-local-strict/_definitions.json"
    kubernetes = DRAFT202012.create_resource(schema_contents(name, KUBERNETES))
    registry = referencing.Registry().with_resource("kubernetes:", kubernetes)
    return jsonschema.Draft202012Validator(definition, registry=registry)


def faults(cluster: Object) -> list[str]:
    """What is wrong with a RayCluster, each with its place; empty if it is taken as it is."""
    return [f"{error.json_path}: {error.message}" for error in _validator().iter_errors(cluster)]
