"""Reads the YAML files that users write: configurations and scenarios.

Nothing but maps, lists and plain values; a key that stands twice is an error, of which YAML would take the last one
without a word. What the keys mean is not known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError

MERGE_TAG = "tag:yaml.org,2002:merge"  # `<<`, which may stand beside keys that it brings, too


class _OnceLoader(yaml.SafeLoader):
    """Lets every key of a map stand once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As it is written: what `<<` brings is not there yet."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE_TAG:
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The map in a YAML file; an empty file is an empty map. Raises ConfigError."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a map of settings, not {type(tree).__name__}")
    return tree
