"""Scenario files: what is brought up, what is asked of it, what goes wrong meanwhile, and what must hold.

    name: a worker dies under load
    topology:
      config: {model: {path: demo}, workers: {embedding: 2, language: 2}}   # as `tandem serve --config` reads it
    oracle: {kind: local}
    steps:
      - name: calm
        load: {requests: 20, concurrency: 4}
      - name: a language worker is killed
        load: {requests: 60, concurrency: 8, max_tokens: 64}
        fault: {kind: kill, worker: language-0, after_answers: 10}
        expect: {max_failed: 0, heals: true}

Unknown names and wrong types are errors that say where. `model.path: demo` is the shipped model that sees, and
`demo-diffusion` the one that fills in masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from cluster.config import build_config
from cluster.demo import DIFFUSION_MODEL_DIR, MODEL_DIR, MODEL_NAME
from cluster.errors import ConfigError
from cluster.yaml_files import read_yaml

Sections = dict[str, dict[str, Any] | None]
SHIPPED = {"demo": MODEL_DIR, "demo-diffusion": DIFFUSION_MODEL_DIR}


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Topology(_Strict):
    """config: the cluster that is started. ray_address: on this Ray; empty: one is started here. url: instead of all
    that, a deployment that runs already.
    """

    config: Sections = pydantic.Field(default_factory=dict)
    ray_address: str = ""
    url: str = pydantic.Field(default="", pattern="^(https?://.+)?$")


class Oracle(_Strict):
    """Where the right answers come from.

    local: the same checkpoint in this process, both halves in one, greedy. demo: the shipped questions and their
    answers. file: a JSON list of {"prompt", "image" (optional), "answer"}, images relative to it. agreement: no right
    answers are known; every answer to a prompt must be the first one's.
    """

    kind: Literal["local", "demo", "file", "agreement"] = "demo"
    file: str = ""


class Load(_Strict):
    """So many requests, so many at a time; every other one is streamed. images: the share that has a picture."""

    requests: int = pydantic.Field(default=20, ge=1)
    concurrency: int = pydantic.Field(default=4, ge=1, le=256)
    max_tokens: int = pydantic.Field(default=16, ge=1)
    images: float = pydantic.Field(default=0.5, ge=0.0, le=1.0)


class Fault(_Strict):
    """What goes wrong once after_answers requests of the step were answered.

    kill: the process of `worker` is killed. stop: it is stopped, as if it hung. upgrade: a second cluster with `config`
    over the topology's takes over, and the first one drains.
    """

    kind: Literal["kill", "stop", "upgrade"]
    worker: str = ""
    after_answers: int = pydantic.Field(default=0, ge=0)
    config: Sections = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _has_what_it_needs(self) -> Fault:
        if (self.kind == "upgrade") == bool(self.worker):
            raise ValueError("kill and stop need a worker (language-0, say), and upgrade has none")
        return self


class Expect(_Strict):
    """What must hold beside right answers. max_failed: requests that may fail, with a typed error. max_ttft_ms: bound
    of the median time to the first token; 0: none. heals: every worker is back and holds nothing at the end.
    """

    max_failed: int = pydantic.Field(default=0, ge=0)
    max_ttft_ms: float = pydantic.Field(default=0.0, ge=0.0)
    heals: bool = True


class Step(_Strict):
    """One load with what goes wrong during it."""

    name: str = pydantic.Field(min_length=1)
    load: Load = Load()
    fault: Fault | None = None
    expect: Expect = Expect()


class Scenario(_Strict):
    """A whole file."""

    name: str = pydantic.Field(min_length=1)
    topology: Topology = Topology()
    oracle: Oracle = Oracle()
    steps: list[Step] = pydantic.Field(min_length=1)


def load_scenario(path: str | Path) -> Scenario:
    """Raises ConfigError that names the file and the place in it."""
    path = Path(path)
    tree = read_yaml(path)
    try:
        scenario = Scenario.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place or 'the scenario'}: {first['msg']}") from None
    for place, config in _configs(scenario):
        try:
            build_config(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {place}: {error}") from error
    return _with_paths(scenario, path.resolve().parent)


def _configs(scenario: Scenario) -> Iterator[tuple[str, Sections]]:
    """(place, configuration) of every cluster that the file describes."""
    yield "topology.config", scenario.topology.config
    for number, step in enumerate(scenario.steps):
        if step.fault is not None:
            yield f"steps.{number}.fault.config", merged(scenario.topology.config, step.fault.config)


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Sections:
    """The configuration with the settings of `changes` over it."""
    return {name: dict(config.get(name) or {}) | dict(changes.get(name) or {}) for name in {*config, *changes}}


def _with_paths(scenario: Scenario, folder: Path) -> Scenario:
    """The shipped model that the file names, if it does; the oracle's file beside the scenario's."""
    config = {section: dict(values or {}) for section, values in scenario.topology.config.items()}
    if shipped := SHIPPED.get(config.get("model", {}).get("path", "")):
        config["model"] = {"served_model_name": MODEL_NAME, **config["model"], "path": str(shipped)}
    oracle = scenario.oracle
    if oracle.kind == "file":
        if not oracle.file:
            raise ConfigError(f"{scenario.name}: oracle.kind is file; name the file in oracle.file")
        oracle = oracle.model_copy(update={"file": str(folder / oracle.file)})
    topology = scenario.topology.model_copy(update={"config": config})
    return scenario.model_copy(update={"topology": topology, "oracle": oracle})
