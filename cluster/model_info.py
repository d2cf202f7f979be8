"""ModelInfo: what the front needs of a checkpoint folder: tokenizer, chat template, the image placeholder.

Loads no weights. Which halves exist is read off the two workers' model tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.chat import ChatTemplate, load_chat_template
from cluster.errors import ConfigError, NoChatTemplate
from embedding_worker.models import VISION_MODELS
from language_worker.models import open_model, resolve_model
from language_worker.tokenizer import Tokenizer
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_torch import find_torch_files


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """One checkpoint as the front sees it. image_token_id: None for a model without a vision half."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    image_token_id: int | None

    @property
    def has_vision(self) -> bool:
        return self.image_token_id is not None

    @classmethod
    def load(cls, path: str | Path, config_overrides: Mapping[str, Any] | None = None) -> ModelInfo:
        """config_overrides: as in ModelConfig. Raises ConfigError or the tokenizer's errors for a folder that cannot be
        used.
        """
        folder = Path(path)
        tokenizer = Tokenizer(folder)
        config = _read_config(folder, config_overrides or {})
        is_multimodal = _names_vision(config)
        image_token_id = config.get("image_token_id", tokenizer.special_tokens.get("<|image_pad|>"))
        system_prompt = ""
        if is_multimodal and "vision_config" not in config:
            spec = resolve_model(config).read_spec(config)
            image_token_id, system_prompt = spec.media_token_id, spec.system_prompt
        if is_multimodal and not isinstance(image_token_id, int):
            raise ConfigError(f"{folder}/config.json has a vision_config but names no image_token_id")
        try:
            placeholder = tokenizer.token_text(image_token_id) if is_multimodal and image_token_id is not None else ""
            chat_template = load_chat_template(folder, placeholder=placeholder, system_prompt=system_prompt)
        except NoChatTemplate:
            chat_template = None  # a base model: completions only
        return cls(
            tokenizer=tokenizer,
            chat_template=chat_template,
            image_token_id=image_token_id if is_multimodal else None,
        )


def has_vision(path: str | Path, config_overrides: Mapping[str, Any]) -> bool:
    """Whether a checkpoint folder's config.json describes a vision half. Raises ConfigError."""
    return _names_vision(_read_config(Path(path), config_overrides))


def fills_masks(path: str | Path, config_overrides: Mapping[str, Any]) -> bool:
    """Whether a checkpoint folder's model is decoded by filling in masks. Raises ConfigError, or ModelNotSupported."""
    config = _read_config(Path(path), config_overrides)
    return resolve_model(config).read_spec(config).mask_token_id is not None


def _names_vision(config: dict[str, Any]) -> bool:
    return "vision_config" in config or any(name in VISION_MODELS for name in config.get("architectures") or ())


def _read_config(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, or what the weights say where it says little or is not there, under the overrides."""
    has_weights = bool(find_torch_files(folder))
    if (folder / "config.json").is_file() or not has_weights:
        config = Checkpoint(folder=folder, tensors={}, overrides=overrides).config()
        if config.get("architectures") or not has_weights:
            return config
    return open_model(folder, overrides).config()
