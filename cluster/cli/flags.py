"""Flags that set the configuration, and the configuration they make: file first, flags over it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError


def port_number(text: str) -> int:
    """For argparse: 0 to 65535."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port; use 0 (any free one) to 65535")
    return port


# flag -> (dotted settings it sets, type, help)
MODEL_FLAGS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "--served-model-name": (("model.served_model_name",), str, "the name clients ask for (default: the folder's)"),
    "--device": (("model.device",), str, "auto (default), cpu, cuda, cuda:1, ..."),
    "--dtype": (("model.dtype",), str, "auto (default: the checkpoint's), float32, bfloat16 or float16"),
    "--quantization": (("model.quantization",), str, "none (default), int8, int8_dynamic or int4: stored weights"),
    "--max-model-len": (("model.max_model_len",), int, "longest prompt plus answer in tokens"),
    "--lora": (("language.lora",), str, "a low-rank adapter to merge into the weights: lora_*.pth, or a PEFT folder"),
    "--block-size": (("transfer.block_size",), int, "rows per transfer block (default 128)"),
    "--default-allocate-tokens": (
        ("transfer.default_allocate_tokens",),
        int,
        "rows granted to a stream whose length is not known yet (default 8192)",
    ),
}
SERVE_FLAGS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "--embedding-workers": (("workers.embedding",), int, "how many embedding workers (default 1)"),
    "--language-workers": (("workers.language",), int, "how many language workers (default 1)"),
    "--prefill-workers": (
        ("workers.prefill",),
        int,
        "how many compute prompts, in place of language workers",
    ),
    "--decode-workers": (("workers.decode",), int, "how many go on from there to the answers"),
    "--host": (("gateway.host",), str, "address to serve on (default 127.0.0.1)"),
    "--port": (("gateway.port",), port_number, "port to serve on (default 8000; 0: any free one)"),
}


def add_flags(parser: argparse.ArgumentParser, flags: dict[str, tuple[tuple[str, ...], Any, str]]) -> None:
    """Declare flags of the tables above."""
    for flag, (_, kind, text) in flags.items():
        parser.add_argument(flag, type=kind, default=None, help=text, metavar="TEXT" if kind is str else "INT")


def add_key_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="ask clients for this key (repeatable)"
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="the same, one key per line")
    parser.add_argument(
        "--media-host",
        action="append",
        default=[],
        metavar="HOST",
        help="read images of http(s) URLs from this host (repeatable; .DOMAIN: all below it, *: any public one)",
    )


def config_from(options: argparse.Namespace, **fixed: Any) -> ClusterConfig:
    """The resolved configuration: --config, then flags, then `fixed` dotted settings (a "__" stands for the dot)."""
    return read_config(options, **fixed).resolve()


def read_config(options: argparse.Namespace, **fixed: Any) -> ClusterConfig:
    """The same, not resolved: nothing of the model folder is looked at."""
    overrides: dict[str, Any] = {}
    for flag, (settings, _, _) in (MODEL_FLAGS | SERVE_FLAGS).items():
        value = getattr(options, flag.removeprefix("--").replace("-", "_"), None)
        if value is not None:
            overrides.update(dict.fromkeys(settings, value))
    if getattr(options, "model", None):
        overrides["model.path"] = options.model
    keys = _api_keys(options)
    if keys:
        overrides["gateway.api_keys"] = keys
    if hosts := getattr(options, "media_host", []):
        overrides["gateway.media_hosts"] = hosts
    overrides.update({name.replace("__", "."): value for name, value in fixed.items()})
    return load_config(getattr(options, "config", None), overrides)


def _api_keys(options: argparse.Namespace) -> list[str]:
    keys = list(getattr(options, "api_key", []))
    path = getattr(options, "api_key_file", None)
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read --api-key-file {path}: {error.strerror}") from error
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise ConfigError(f"--api-key-file {path} holds no key; put one per line")
    return keys
