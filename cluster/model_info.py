"""ModelInfo: what the front needs of a checkpoint folder: tokenizer, chat template, the image placeholder.

Loads no weights. Which halves exist is read off the two workers' model tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.chat import ChatTemplate, load_chat_template
from cluster.errors import ConfigError, NoChatTemplate
from language_worker.models import open_model
from language_worker.tokenizer import Tokenizer


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
    def load(cls, path: str | Path) -> ModelInfo:
        """Raises ConfigError or the tokenizer's errors for a folder that cannot be used."""
        folder = Path(path)
        tokenizer = Tokenizer(folder)
        config = _read_config(folder)
        is_multimodal = _names_vision(config)
        image_token_id = config.get("image_token_id", tokenizer.special_tokens.get("<|image_pad|>"))
        if is_multimodal and not isinstance(image_token_id, int):
            raise ConfigError(f"{folder}/config.json has a vision_config but names no image_token_id")
        try:
            chat_template = load_chat_template(folder)
        except NoChatTemplate:
            chat_template = None  # a base model: completions only
        return cls(
            tokenizer=tokenizer,
            chat_template=chat_template,
            image_token_id=image_token_id if is_multimodal else None,
        )


def has_vision(path: str | Path) -> bool:
    """Whether a checkpoint folder's config.json describes a vision half. Raises ConfigError."""
    return _names_vision(_read_config(Path(path)))


def _names_vision(config: dict[str, Any]) -> bool:
    return "vision_config" in config


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file() and folder.is_dir():
        return open_model(folder).config()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'} must hold a JSON object")
    return config
