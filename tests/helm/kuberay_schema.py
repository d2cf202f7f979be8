"""A strict JSON schema of the RayCluster fields that the chart uses, ray.io/v1.

Written from the field reference of KubeRay 1.6.2 (docs.ray.io, "KubeRay CRD API reference"). Pod templates are left
open here: Kubernetes' own strict schemas judge them.
"""

from __future__ import annotations

from typing import Any

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
OBJECTS = {"type": "array", "items": {"type": "object"}}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


_TEMPLATE = _object(("spec",), metadata={"type": "object"}, spec={"type": "object"})
_CREDENTIAL = _object((), value={"type": "string"}, valueFrom={"type": "object"})
RAY_CLUSTER = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=_object(
        ("name",),
        name={"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"},
        labels=STRINGS,
        annotations=STRINGS,
    ),
    spec=_object(
        ("headGroupSpec",),
        rayVersion={"type": "string"},
        enableInTreeAutoscaling={"type": "boolean"},
        suspend={"type": "boolean"},
        headServiceAnnotations=STRINGS,
        autoscalerOptions=_object(
            (),
            version={"enum": ["v1", "v2"]},
            resources={"type": "object"},
            image={"type": "string"},
            imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
            env=OBJECTS,
            envFrom=OBJECTS,
            volumeMounts=OBJECTS,
            securityContext={"type": "object"},
            idleTimeoutSeconds=COUNT,
            upscalingMode={"enum": ["Default", "Conservative", "Aggressive"]},
        ),
        gcsFaultToleranceOptions=_object(
            ("redisAddress",),
            redisAddress={"type": "string"},
            externalStorageNamespace={"type": "string"},
            redisUsername=_CREDENTIAL,
            redisPassword=_CREDENTIAL,
        ),
        headGroupSpec=_object(
            ("template",),
            serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
            enableIngress={"type": "boolean"},
            rayStartParams=STRINGS,
            template=_TEMPLATE,
        ),
        workerGroupSpecs={
            "type": "array",
            "items": _object(
                ("groupName", "template", "minReplicas", "maxReplicas"),
                groupName={"type": "string"},
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                numOfHosts=COUNT,
                rayStartParams=STRINGS,
                template=_TEMPLATE,
            ),
        },
    ),
)
