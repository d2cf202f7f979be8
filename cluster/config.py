"""ClusterConfig: the whole configuration, made of what each component owns.

Composition, never inheritance: every package's frozen config sits under its own key and each actor is handed only its
part. One path leads here: YAML (helm renders its values to the same keys) -> overrides -> strict build, where an
unknown key or a wrong type is an error that names it -> `resolve()`, a new object with every "auto" that spans
components filled in.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from cluster.errors import ConfigError
from cluster.media_rules import MediaRules
from cluster.model_info import fills_masks
from cluster.router import WorkerKind
from cluster.yaml_files import read_yaml
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedError
from kernels.quantised_matrix import Quantization
from language_worker.api import MAX_DEADLINE_MS
from language_worker.config import DTypeName, EngineConfig
from language_worker.errors import EngineError
from language_worker.nanochat_files import choose_folder
from transfer.config import TransferConfig
from transfer.endpoints.addresses import is_loopback
from transfer.errors import TransferError

MIB = 1024 * 1024
Placement = Literal["any", "roles"]
MODEL_FILES = ("config.json", "*.pth", "*.pt")  # one of which a model folder has
MAX_TIMEOUT_S = MAX_DEADLINE_MS / 1e3  # what the workers take; no thread can wait for ten times that
MIN_KEY_CHARS = 16  # of an API key, where the gateway listens for more than this machine


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which checkpoint is served, and how. dtype and device fill every worker's "auto"; quantization is the language
    workers'; max_model_len 0: the checkpoint's. served_model_name "": the folder's name. config_overrides: entries to
    use instead of the checkpoint's config.json, for both halves and the gateway.
    """

    path: str = ""
    served_model_name: str = ""
    dtype: DTypeName = "auto"
    device: str = "auto"
    quantization: Quantization = "none"
    max_model_len: int = 0
    config_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_model_len < 0:
            raise ConfigError(f"model.max_model_len is {self.max_model_len}; use 0 (the checkpoint's) or more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """The HTTP side. api_keys: empty means no key is asked for. port 0: any free one. Bytes, seconds and counts are
    upper bounds of one request; max_concurrent_requests is of the whole gateway.
    media_hosts, media_private_networks: where images are read from by http(s) URL (`MediaRules`); by default nowhere.
    media_timeout_s: of each, from its look-up to its last byte. drain_s: how long running requests may take to end when
    the gateway stops.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_images_per_request: int = 32
    max_body_bytes: int = 256 * MIB
    max_image_bytes: int = 32 * MIB
    max_prompt_chars: int = 4_000_000
    request_timeout_s: float = 600.0
    max_concurrent_requests: int = 1024
    media_hosts: tuple[str, ...] = ()
    media_private_networks: tuple[str, ...] = ()
    media_timeout_s: float = 20.0
    drain_s: float = 30.0

    @property
    def media_rules(self) -> MediaRules:
        return MediaRules(self.media_hosts, self.media_private_networks)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"gateway.port is {self.port}; use 0 (any free port) to 65535")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and value < 1:
                raise ConfigError(f"gateway.{field.name} is {value}; use at least 1")
            if field.name.endswith("_s"):
                _check_seconds(f"gateway.{field.name}", value)
        _ = self.media_rules  # which checks them
        if not self.host:
            raise ConfigError("gateway.host is empty, which would mean every interface; name an address")
        self._check_keys()

    def _check_keys(self) -> None:
        if any(not key for key in self.api_keys):
            raise ConfigError("gateway.api_keys holds an empty key, which would let everyone in; remove it")
        if any(not key.isprintable() or " " in key for key in self.api_keys):
            raise ConfigError("gateway.api_keys holds a key with a space or a control character; no client can send it")
        shortest = min(map(len, self.api_keys), default=MIN_KEY_CHARS)
        if shortest < MIN_KEY_CHARS and not is_loopback(self.host):
            raise ConfigError(
                f"gateway.api_keys holds a key of {shortest} characters, which can be guessed; use {MIN_KEY_CHARS} or "
                f"more where others can connect (gateway.host is {self.host})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """How many workers of each kind run, and what Ray sets aside for each. num_gpus -1: one where the device is CUDA.

    prefill, decode: set, they take the place of language workers: prompts are computed on the first, and answers, from
    their KV, on the second. Both are configured by the section `language`.
    placement: "roles" puts every process on a node that offers the Ray resource of its role, of which it takes one:
    tandem-embedding, tandem-language (tandem-prefill, tandem-decode) or tandem-gateway.
    health_timeout_s: silence after which a worker counts as hung and is restarted.
    start_timeout_s: longest wait for all workers to be placed and to load the model.
    """

    embedding: int = 1
    language: int = 1
    prefill: int = 0
    decode: int = 0
    num_cpus: float = 1.0
    num_gpus: float = -1.0
    placement: Placement = "any"
    health_timeout_s: float = 15.0
    start_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("embedding", "language"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"workers.{name} is {getattr(self, name)}; at least one worker of each kind is needed"
                )
        if min(self.prefill, self.decode) < (1 if self.is_split else 0):
            raise ConfigError(
                f"workers.prefill is {self.prefill} and workers.decode is {self.decode}; set both to 1 or more, "
                "or neither"
            )
        if self.is_split and self.language != 1:
            raise ConfigError(
                f"workers.language is {self.language}, but prefill and decode workers take the place of language "
                "workers; leave it out"
            )
        if self.placement not in typing.get_args(Placement):
            raise ConfigError(f"workers.placement is {self.placement!r}; use {' or '.join(typing.get_args(Placement))}")
        for name in ("health_timeout_s", "start_timeout_s"):
            _check_seconds(f"workers.{name}", getattr(self, name))
        if not 0 <= self.num_cpus < math.inf or not (self.num_gpus == -1 or 0 <= self.num_gpus < math.inf):
            raise ConfigError(
                "workers.num_cpus must not be negative; workers.num_gpus may be -1 for one where there is CUDA"
            )

    @property
    def is_split(self) -> bool:
        return bool(self.prefill or self.decode)

    @property
    def counts(self) -> dict[WorkerKind, int]:
        """How many of each kind there are to be."""
        engines: dict[WorkerKind, int] = {"prefill": self.prefill, "decode": self.decode}
        return {"embedding": self.embedding, **(engines if self.is_split else {"language": self.language})}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Everything. Each field's class says what may be set under that key of the YAML."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    embedding: EmbedConfig = dataclasses.field(default_factory=EmbedConfig)
    language: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)
    gateway: GatewayConfig = dataclasses.field(default_factory=GatewayConfig)
    workers: WorkersConfig = dataclasses.field(default_factory=WorkersConfig)

    def resolve(self) -> ClusterConfig:
        """A new config: model path absolute and checked, the model's dtype, device and length handed to the workers,
        limits that must agree made equal. Raises ConfigError; for workers that hand KV on, also ModelNotSupported.
        """
        if not self.model.path:
            raise ConfigError("no model is named; use --model DIR or set model.path in the configuration")
        folder = choose_folder(Path(self.model.path).expanduser().resolve())
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(f"{folder} {what}; point --model at a model folder")
        if not any(path for pattern in MODEL_FILES for path in folder.glob(pattern)):
            raise ConfigError(f"{folder} holds no config.json and no .pth or .pt file; point --model at a model folder")
        model = dataclasses.replace(
            self.model,
            path=str(folder),
            served_model_name=self.model.served_model_name or folder.name,
            config_overrides=self.config_overrides(),
        )
        embedding = dataclasses.replace(
            _with_model(self.embedding, model),
            max_image_bytes=min(self.embedding.max_image_bytes, self.gateway.max_image_bytes),
            max_images_per_request=max(self.embedding.max_images_per_request, self.gateway.max_images_per_request),
        )
        language = _with_model(self.language, model)
        if language.lora:
            language = dataclasses.replace(language, lora=str(Path(language.lora).expanduser().resolve()))
        if model.max_model_len and not language.max_model_len:
            language = dataclasses.replace(language, max_model_len=model.max_model_len)
        if self.workers.is_split and language.draft_model:
            raise ConfigError(
                "language.draft_model is set, and a draft model's KV is not handed from prefill to decode workers; use "
                "language workers, or decode_strategy 'speculative' without a draft model"
            )
        if language.preemption == "swap" and fills_masks(folder, language.config_overrides):
            raise ConfigError(
                f"language.preemption is 'swap', and {folder} is a model that fills in masks: a canvas that has begun "
                "holds all its pages and is never preempted; use 'recompute'"
            )
        if language.quantization == "none":
            language = dataclasses.replace(language, quantization=model.quantization)
        if embedding.dtype != language.dtype:
            raise ConfigError(
                f"embedding.dtype is {embedding.dtype} and language.dtype is {language.dtype}; embedding rows travel "
                "as they are, so both halves need one dtype (set model.dtype)"
            )
        return dataclasses.replace(self, model=model, embedding=embedding, language=language)

    def config_overrides(self) -> dict[str, Any]:
        """What any section says against config.json. A checkpoint has one for both halves, so they all count, and
        sections that contradict each other are a ConfigError.
        """
        found: dict[str, Any] = {}
        for section in ("model", "embedding", "language"):
            for name, value in getattr(self, section).config_overrides.items():
                if repr(found.setdefault(name, value)) != repr(value) and found[name] != value:  # NaN is no NaN's equal
                    raise ConfigError(
                        f"{section}.config_overrides.{name} is {value!r}, and another section says {found[name]!r}; "
                        "both halves read one config.json: set it once, in model.config_overrides"
                    )
        return found


P = TypeVar("P", EmbedConfig, EngineConfig)


def _check_seconds(name: str, value: float) -> None:
    if not 0 < value <= MAX_TIMEOUT_S:
        raise ConfigError(f"{name} is {value}; use a positive number of seconds, {MAX_TIMEOUT_S:g} at most")


def _with_model(part: P, model: ModelConfig) -> P:
    """A worker's config whose "auto" dtype and device, and what it reads config.json with, are the model's."""
    values: dict[str, Any] = {
        name: getattr(model, name) for name in ("dtype", "device") if getattr(part, name) == "auto"
    }
    values["config_overrides"] = model.config_overrides
    return dataclasses.replace(part, **values)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """The configuration in a YAML file (None: the defaults), with dotted overrides such as {"gateway.port": 0}.

    Raises ConfigError that names the file, the key and what is wrong with it.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_yaml(Path(path))
        try:
            build_config(tree)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    for dotted, value in (overrides or {}).items():
        section, _, name = dotted.partition(".")
        tree[section] = {**(tree.get(section) or {}), name: value}
    return build_config(tree)


def flat_overrides(tree: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with settings given by their bare names: to the model section if it has that name, else to every component
    that has it; a section's name with a map is merged into that section. Raises ConfigError for an unknown name.
    """
    kinds: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(ClusterConfig)}
    names = {section: {f.name for f in dataclasses.fields(kind)} for section, kind in kinds.items()}
    for name, value in overrides.items():
        if name in kinds:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} must be a map of settings, not {value!r}")
            tree[name] = {**tree.get(name, {}), **value}
            continue
        components = ("embedding", "language", "transfer")
        sections = ["model"] if name in names["model"] else [s for s in components if name in names[s]]
        if not sections:
            known = sorted(names["model"].union(*(names[s] for s in components)))
            raise ConfigError(f"unknown setting {name}; known here: {', '.join(known)}")
        for section in sections:
            tree.setdefault(section, {})[name] = value
    return tree


def build_config(tree: Mapping[str, Any]) -> ClusterConfig:
    """Strictly from a plain tree: unknown keys, wrong types and bad values raise ConfigError naming the key."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(ClusterConfig)}
    _reject_unknown("", tree, sections)
    return ClusterConfig(**{name: _section(name, sections[name], tree[name]) for name in tree})


def _section(name: str, kind: Any, values: object) -> Any:
    if values is None:
        return kind()
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} must be a map of settings, not {values!r}")
    _reject_unknown(f"{name}.", values, {f.name for f in dataclasses.fields(kind)})
    hints = typing.get_type_hints(kind)
    checked = {key: _checked(f"{name}.{key}", hints[key], value) for key, value in values.items()}
    try:
        return kind(**checked)
    except (EmbedError, EngineError, TransferError) as error:
        raise ConfigError(f"{name}: {error}") from error


def _checked(name: str, hint: Any, value: object) -> Any:
    """`value` if it has the type of the hint; a list becomes a tuple."""
    try:
        return pydantic.TypeAdapter(hint).validate_python(
            tuple(value) if isinstance(value, list) else value, strict=True
        )
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{name}: {first['msg']} (got {value!r})") from None


def _reject_unknown(prefix: str, values: Mapping[str, Any], known: Any) -> None:
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ConfigError(f"unknown setting {prefix}{unknown[0]}; known here: {', '.join(sorted(known))}")
