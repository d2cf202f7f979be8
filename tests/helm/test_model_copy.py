"""The script that copies a checkpoint from a store, with a stand-in for rclone that copies between folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helm.rendering import CHART, Object, containers, rendered

SCRIPT = CHART / "files" / "copy_model.sh"
# `lsf` and `copy` with --include and --exclude: a pattern that begins with "/" counts from the top, any other for names
# at every depth; "**" is all below a folder. As rclone 1.60 treats these files.
RCLONE = """#!{python}
import fnmatch, pathlib, shutil, sys
command, *words = sys.argv[1:]
flags = [word for word in words if word.startswith("--")]
include = [words[i + 1] for i, word in enumerate(words) if word == "--include"]
exclude = [flag.partition("=")[2] for flag in flags if flag.startswith("--exclude=")]
places = [word for word in words if not word.startswith("--") and word not in include]
source = pathlib.Path(places[0])
if not source.is_dir():
    sys.exit("directory not found")
def fits(name, pattern):
    if not pattern.startswith("/"):
        return fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)
    if not pattern.endswith("/**") and "/" in name:
        return False
    return fnmatch.fnmatchcase("/" + name, pattern)
names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
names = [name for name in names if not any(fits(name, pattern) for pattern in exclude)]
if command == "lsf":
    print("\\n".join(name for name in names if "/" not in name and any(fits(name, p) for p in include)))
else:
    for name in names:
        (pathlib.Path(places[1]) / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, pathlib.Path(places[1]) / name)
"""
SMALL = {"config.json", "tokenizer.json", "preprocessor_config.json", "adapter/adapter_model.bin", "lora_style.pth"}
SHARDS = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
AGAIN = {
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
    "qwen-q4.gguf", "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx",
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty store; put beside it: rclone."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "rclone"
    program.write_text(RCLONE.replace("{python}", sys.executable))
    program.chmod(0o755)
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def _put(store: Path, names: set[str]) -> None:
    for name in names:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text(name)


def _copy(store: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """What the script said, and the files that arrived."""
    target = store.parent / "models" / "qwen"
    shutil.rmtree(target, ignore_errors=True)
    environment = os.environ | {"PATH": f"{store.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", str(SCRIPT), str(store), str(target), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}


def test_the_same_weights_in_other_formats_stay_in_the_store(store: Path) -> None:
    _put(store, SMALL | SHARDS | AGAIN)
    done, copied = _copy(store)
    assert done.returncode == 0, done.stderr
    assert copied == SMALL | SHARDS


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "full_sft_512.pth", "model_000700.pt"])
def test_weights_that_come_in_one_format_only_are_copied(store: Path, weights: str) -> None:
    _put(store, {"config.json", weights})
    done, copied = _copy(store)
    assert done.returncode == 0 and copied == {"config.json", weights}, done.stderr


def test_an_empty_place_is_an_error_that_says_where_to_look(store: Path) -> None:
    done, _ = _copy(store)
    assert done.returncode != 0 and "model.s3.prefix" in done.stderr
    store.rmdir()
    done, _ = _copy(store)
    assert done.returncode != 0 and "directory not found" in done.stderr


def _copier(pod: str) -> Object:
    (found,) = [c for where, c, _ in containers(rendered("s3")) if where.endswith(f"/{pod}/model")]
    return found


def test_the_gateway_takes_no_weights_along(store: Path) -> None:
    _put(store, SMALL | SHARDS | AGAIN)
    command, flags = _copier("gateway")["command"][:4], _copier("gateway")["command"][4:]
    assert command[:2] == ["sh", "/etc/tandem/scripts/copy_model.sh"] and command == _copier("language")["command"]
    assert command[2:] == [":s3:models/qwen/Qwen2.5-VL-7B-Instruct", "/models/Qwen2.5-VL-7B-Instruct"]
    done, copied = _copy(store, *flags)
    assert done.returncode == 0, done.stderr
    assert copied == SMALL | {"model.safetensors.index.json"}
