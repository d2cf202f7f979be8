"""The text half of Qwen3-VL: a Qwen3 decoder with interleaved M-RoPE, fed with text and media embeddings.

What earlier layers of the vision tower saw comes along as further planes of every media row ("deepstack") and is added
behind the first layers. Positions and key layouts are Qwen2.5-VL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from language_worker.errors import ModelNotSupported
from language_worker.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLText
from language_worker.models.windows import none_slide

DEFAULT_SECTIONS = (24, 20, 20)
DEFAULT_THETA = 5_000_000.0
DEFAULT_LAYERS = (8, 16, 24)  # of the vision tower, where config.json does not say


class Qwen3VLText(Qwen2_5_VLText):
    """See the module."""

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> Qwen2_5_VLConfig:
        return read_config(config)


def read_config(config: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """What the text half takes from config.json; ModelNotSupported names a bad option."""
    base = Qwen2_5_VLConfig.read(config, sections=DEFAULT_SECTIONS, theta=DEFAULT_THETA, window_rule=none_slide)
    layers = (config.get("vision_config") or {}).get("deepstack_visual_indexes")
    layers = DEFAULT_LAYERS if layers is None else layers
    if len(layers) > base.spec.kv.num_layers:
        raise ModelNotSupported(
            f"config.json has {len(layers)} deepstack_visual_indexes for {base.spec.kv.num_layers} layers of text"
        )
    planes = ("embeddings", *(f"deepstack.{i}" for i in range(len(layers))))
    return replace(
        base,
        spec=replace(base.spec, media_planes=planes),
        block=replace(base.block, has_qk_norm=True),
        interleaved=True,
    )
