"""The distribution: import names that belong to us alone, packages listed by hand, data files, what imports load.

PyPI has projects named `kernels`, `cluster` and `transfer`, and transformers probes an installed `kernels`: these are
the guards that keep our folders from being taken for theirs, and theirs for ours.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = ("kernels", "transfer", "embedding_worker", "language_worker", "cluster")
CORE = (
    "language_worker.engine_builder",
    "language_worker.tokenizer",
    "embedding_worker.runner",
    "embedding_worker.pipeline",
    "transfer.checkpoint",
    "kernels.paged_attention",
    "kernels.varlen_attention",
)


def _pyproject() -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _optional(extra: str) -> list[str]:
    """The requirements of an extra."""
    found = _pyproject()["project"]["optional-dependencies"][extra]
    assert isinstance(found, list)
    return found


def _loaded_by(*modules: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that imported `modules`."""
    code = f"import sys\nimport {', '.join(modules)}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def _folders_with_code() -> set[str]:
    return {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in TOP_LEVEL
        for path in (ROOT / package).rglob("__init__.py")
    }


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_each_name_is_ours_alone(name: str) -> None:
    assert set(importlib.metadata.packages_distributions()[name]) == {"tandem-serve"}
    module = importlib.import_module(name)
    assert module.__file__ is not None and Path(module.__file__).resolve() == ROOT / name / "__init__.py"


def test_the_version_stays_below_what_transformers_looks_for() -> None:
    assert importlib.metadata.version("tandem-serve").startswith("0.1.")
    assert str(_pyproject()["project"]["version"]).startswith("0.1.")
    assert not hasattr(importlib.import_module("kernels"), "__version__")


def test_transformers_does_not_take_our_kernels_for_theirs() -> None:
    code = (
        "import transformers.utils.import_utils as u, transformers.modeling_utils\n"
        "assert u.is_kernels_available() is False\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_torch_s_build_for_cuda_pins_is_pinned_nowhere_else() -> None:
    """A plain index gives that build, and pip finds no answer where our constraints name another version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = {line.partition("==")[0].lower() for line in lines if line and not line.startswith("#")}
    assert "torch" in names and len(names) > 80
    assert not {name for name in names if name == "triton" or name.startswith(("nvidia-", "cuda-"))}
    for extra in ("gpu", "dev"):
        (wanted,) = [text for text in _optional(extra) if text.startswith("triton")]
        assert Requirement(wanted).specifier.contains("3.7.1") and Requirement(wanted).specifier.contains("3.9.0")
        assert not Requirement(wanted).specifier.contains("3.10.0"), "its default of float fusion is another one"


def test_packages_are_listed_by_hand_and_all_of_them() -> None:
    listed = _pyproject()["tool"]["setuptools"]["packages"]
    assert isinstance(listed, list)
    assert len(listed) == len(set(listed))
    assert set(listed) == _folders_with_code()


def test_every_folder_of_modules_is_a_package() -> None:
    """A namespace folder would lose to any installed package of its name; in tests it would hide ours."""
    folders = {path.parent for top in (*TOP_LEVEL, "tests", "examples") for path in (ROOT / top).rglob("*.py")}
    missing = [folder.relative_to(ROOT).as_posix() for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, missing


def test_training_needs_the_train_extra_and_no_more() -> None:
    project = _pyproject()["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["train"]]  # type: ignore[misc]
    provided = {re.split(r"[^\w-]", str(requirement))[0].lower() for requirement in listed}
    files = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples" / "train").glob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    imported = {
        name.split(".")[0]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    } - {*sys.stdlib_module_names, *TOP_LEVEL, "examples"}
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn"}
    assert {distributions.get(name, name) for name in imported} <= provided
    assert "sklearn" in imported


def test_a_wheel_holds_every_module_and_the_demo(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in TOP_LEVEL:
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("tandem_serve-0.1.*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "tandem = cluster.__main__:main" in archive.read(entry_points).decode()
        weights = archive.getinfo("cluster/demo/model/model.safetensors").file_size
        masked = [archive.getinfo(f"cluster/demo/{n}/model.safetensors").file_size for n in ("diffusion", "reader")]
    modules = {path.relative_to(ROOT).as_posix() for top in TOP_LEVEL for path in (ROOT / top).rglob("*.py")}
    demo = ROOT / "cluster" / "demo"
    files = [path.relative_to(ROOT) for path in demo.rglob("*") if path.is_file()]
    data = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "_native").glob("*.[ch]")}
    assert inside == modules | data | sources
    for name in (
        "model/config.json",
        "model/tokenizer.json",
        "model/preprocessor_config.json",
        "images/questions.json",
        "diffusion/config.json",
        "reader/config.json",
        "reader/tokenizer.json",
    ):
        assert f"cluster/demo/{name}" in inside
    assert sum(name.startswith("cluster/demo/images/") and name.endswith(".png") for name in inside) >= 4
    assert 1_000_000 < weights <= 8 * 1024 * 1024
    assert min(masked) > 100_000 and sum(masked) <= 8 * 1024 * 1024


def test_a_script_s_llm_needs_neither_ray_nor_zeromq_nor_a_web_server() -> None:
    loaded = _loaded_by("cluster")
    assert {"torch", "cluster"} <= loaded
    assert not loaded & {"ray", "zmq", "msgpack", "fastapi", "starlette", "uvicorn", "triton", "transformers", "openai"}


def test_the_core_imports_with_torch_safetensors_tokenizers_and_numpy_alone() -> None:
    loaded = _loaded_by(*CORE)
    assert {"torch", "safetensors", "tokenizers", "numpy"} <= loaded
    assert not loaded & {"msgpack", "zmq", "pydantic", "ray", "yaml", "jinja2", "rich", "httpx", "cluster"}


@pytest.mark.parametrize("blocked", ["ray", "zmq"])
def test_the_llm_runs_where_ray_or_zeromq_is_not_installed(blocked: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{blocked!r}] = None\n"  # an import of it raises ModuleNotFoundError, as if it were not there
        "from cluster import LLM, SamplingParams\n"
        "import cluster.demo, pathlib\n"
        "folder = pathlib.Path(cluster.demo.__file__).parent / 'model'\n"
        "with LLM(model=str(folder), num_threads=1, kv_cache_tokens=512) as llm:\n"
        "    print(llm.generate('Hi', SamplingParams(max_tokens=2, temperature=0.0))[0].num_prompt_tokens)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
