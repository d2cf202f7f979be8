"""config.json's quantization_config: the layout that it describes, or why that is not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.checkpoint_json import Kinds, shown, wrong_values
from transfer.packed_layouts import AwqLayout, CompressedLayout, GptqLayout, PackedLayout

SECTION = "quantization_config"
PLACE = f"config.json's {SECTION}"
INSTEAD = "take the original checkpoint and set quantization to 'int8' or 'int4'"
BITS = (4, 8)
WEIGHTS: Kinds = {"num_bits": "size", "symmetric": "flag", "type": "text", "strategy": "text", "actorder": "text"}
KINDS: Kinds = {
    "bits": "size",
    "desc_act": "flag",
    "sym": "flag",
    "zero_point": "flag",
    "version": "text",
    "checkpoint_format": "text",
    "format": "text",
    "dynamic": "map",
    "config_groups": "map",
}
ORDERS = {"group": True, "dynamic": True, "weight": False, "static": False, None: False}  # whether inputs lie apart


class UnreadLayout(ValueError):
    """What a section says is not read; the text says why."""


def stated_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of quantised weights; empty where it says nothing."""
    return config.get(SECTION) or (config.get("text_config") or {}).get(SECTION) or {}


def read_layout(section: Mapping[str, Any]) -> PackedLayout:
    """Raises UnreadLayout."""
    method = section.get("quant_method")
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
    if not isinstance(method, str) or method not in readers:
        known = ", ".join(map(repr, readers))
        raise UnreadLayout(
            f"{PLACE}: the weights are quantised by {shown(method)}, a layout that is not read; {known} are; {INSTEAD}"
        )
    _require_kinds(section, KINDS, PLACE)
    return readers[method](section)


def _gptq(section: Mapping[str, Any]) -> PackedLayout:
    kind = str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()
    kind = "marlin" if section.get("is_marlin_format") else kind
    _require(section.get("bits") in BITS, f"bits = {section.get('bits')}", "of gptq 4 and 8 are read")
    _require(kind in ("gptq", "gptq_v2"), f"checkpoint_format = {kind!r}", "of gptq 'gptq' and 'gptq_v2' are read")
    words = section.get("pack_dtype")
    _require(words in (None, "int32"), f"pack_dtype = {words!r}", "words of 'int32' are read")
    changed = [pattern for pattern in section.get("dynamic") or () if not pattern.startswith("-:")]
    _require(not changed, f"settings for {changed[:1]} in dynamic", "one for all matrices is read")
    return GptqLayout(
        bits=section["bits"],
        group_size=_group_size(section),
        has_low_zeros=kind == "gptq",
        is_symmetric=bool(section.get("sym", True)),
        is_reordered=bool(section.get("desc_act")),
    )


def _awq(section: Mapping[str, Any]) -> PackedLayout:
    bits, version = section.get("bits", 4), str(section.get("version") or "gemm").lower()
    _require(bits == 4, f"bits = {bits}", "of awq 4 are read")
    _require(version == "gemm", f"version = {version!r}", "of awq 'gemm' is read")
    return AwqLayout(group_size=_group_size(section))


def _compressed(section: Mapping[str, Any]) -> PackedLayout:
    """One scheme for all matrices, of weights alone."""
    kind = section.get("format")
    _require(kind == "pack-quantized", f"format = {kind!r}", "of compressed-tensors 'pack-quantized' is read")
    groups = list((section.get("config_groups") or {}).values())
    all_maps = all(isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping) for group in groups)
    _require(bool(groups) and all_maps, "config_groups of another form", "groups with weights are read")
    weights = groups[0]["weights"]
    _require_kinds(weights, WEIGHTS, f"{PLACE} in config_groups")
    _require(all(group["weights"] == weights for group in groups), "several config_groups", "equal ones are read")
    has_inputs = any(group.get(f"{side}_activations") for group in groups for side in ("input", "output"))
    _require(not has_inputs, "activations in config_groups", "weights alone are read")
    bits, strategy, order = weights.get("num_bits"), weights.get("strategy"), weights.get("actorder")
    _require(bits in BITS, f"num_bits = {bits}", "of compressed-tensors 4 and 8 are read")
    _require(weights.get("type", "int") == "int", f"type = {weights.get('type')!r}", "'int' is read")
    _require(strategy in ("group", "channel"), f"strategy = {strategy!r}", "'group' and 'channel' are read")
    _require(order in ORDERS, f"actorder = {order!r}", "'group' and 'weight' are read")
    return CompressedLayout(
        bits=bits,
        group_size=_group_size(weights) if strategy == "group" else 0,
        has_zeros=not weights.get("symmetric", True),
        is_reordered=ORDERS[order],
    )


def _group_size(section: Mapping[str, Any]) -> int:
    """0 for one group of all inputs."""
    size = section.get("group_size")
    if type(size) is not int or (size < 1 and size != -1):
        needed = "a positive integer is needed, or -1 for one group"
        raise UnreadLayout(f"{PLACE} has group_size = {shown(size)}; {needed}")
    return 0 if size == -1 else size


def _require(is_read: bool, stated: str, read: str) -> None:
    if not is_read:
        raise UnreadLayout(f"{PLACE} has {stated}, and {read}; {INSTEAD}")


def _require_kinds(values: Mapping[str, Any], kinds: Kinds, place: str) -> None:
    if wrong := wrong_values(values, kinds, place):
        raise UnreadLayout("; ".join(wrong))
