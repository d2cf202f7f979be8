"""Sliding windows: how many of its last keys a query sees in each layer of a family, by its config.json.

A window counts the query's own key; 0 stands for all keys. Families differ in which layers slide and in the key that
switches it on; where config.json lists `layer_types`, families that know the list follow it. Pure: knows no tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

from language_worker.errors import ModelNotSupported

WindowRule = Callable[[Mapping[str, Any], int], tuple[int, ...]]  # (config.json, number of layers) -> of each layer

DEFAULT_WINDOW = 4096  # of families whose config.json may leave it out
SLIDING, WHOLE = "sliding_attention", "full_attention"


def none_slide(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """For families without windows: one that asks for them is refused."""
    if config.get("use_sliding_window") or SLIDING in (config.get("layer_types") or ()):
        raise ModelNotSupported("config.json asks for sliding-window attention, which this architecture does not have")
    return (0,) * num_layers


def upper_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Qwen2, Qwen3, Qwen2.5-VL: `use_sliding_window` switches it on, from layer `max_window_layers` upwards."""
    first = config.get("max_window_layers")
    slides = [i >= (28 if first is None else int(first)) for i in range(num_layers)]
    return _by_type(config, slides, _switched_window(config))


def upper_layers_unswitched(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """dots.llm1: as `upper_layers`, by the window's size alone."""
    first = config.get("max_window_layers")
    slides = [i >= (62 if first is None else int(first)) for i in range(num_layers)]
    return _by_type(config, slides, _window(config, DEFAULT_WINDOW))


def every_other_layer(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Qwen2-MoE: `use_sliding_window` switches it on, for layers 0, 2, 4, ... below `max_window_layers`."""
    end = config.get("max_window_layers")
    slides = [i % 2 == 0 and i < (28 if end is None else int(end)) for i in range(num_layers)]
    return _by_type(config, slides, _switched_window(config))


def switched_for_all(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Qwen3-MoE: `use_sliding_window` switches it on, for all layers."""
    return (_switched_window(config),) * num_layers


def all_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Mistral, whose window has a default."""
    return (_window(config, DEFAULT_WINDOW),) * num_layers


def all_layers_if_given(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Mixtral, whose window has none."""
    return (_window(config, 0),) * num_layers


def listed_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Ministral: all layers, or those that `layer_types` lists."""
    return _by_type(config, [True] * num_layers, _window(config, DEFAULT_WINDOW))


def kept_by_all(windows: tuple[int, ...]) -> int:
    """How many of its last keys a query sees in some layer; 0 where a layer sees all."""
    return max(windows) if all(windows) else 0


def _switched_window(config: Mapping[str, Any]) -> int:
    return _window(config, DEFAULT_WINDOW) if config.get("use_sliding_window") else 0


def _window(config: Mapping[str, Any], default: int) -> int:
    """config.json's `sliding_window`: absent it is `default`, null it is none."""
    window = config.get("sliding_window", default)
    if window is None:
        return 0
    if type(window) is not int or window < 0:
        raise ModelNotSupported(f"config.json has sliding_window = {window!r}; a positive integer or null is needed")
    return window


def _by_type(config: Mapping[str, Any], slides: list[bool], window: int) -> tuple[int, ...]:
    """`window` for layers that `layer_types` lists as sliding, or without that list for those in `slides`."""
    listed = config.get("layer_types")
    if listed is None:
        return tuple(window if slide else 0 for slide in slides)
    if len(listed) != len(slides) or not set(listed) <= {SLIDING, WHOLE}:
        raise ModelNotSupported(
            f"config.json has layer_types {list(listed)}; {len(slides)} of {SLIDING!r} and {WHOLE!r} are served"
        )
    if SLIDING in listed and not window:
        raise ModelNotSupported("config.json lists layers of sliding-window attention and gives them no window")
    return tuple(window if kind == SLIDING else 0 for kind in listed)
