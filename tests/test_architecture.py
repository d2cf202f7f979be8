"""The rules behind the tree, on the source itself: who imports whom, third parties and their one place, sizes, bans.

Function-local imports count. `python -m tests.test_architecture` prints the table of sizes (so does pytest with -s).
"""

from __future__ import annotations

import ast
import functools
import graphlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "transfer": set(),
    "embedding_worker": {"kernels", "transfer"},
    "language_worker": {"kernels", "transfer"},
    "cluster": {"kernels", "transfer", "embedding_worker", "language_worker"},
}
# Within transfer, whose parts stand on each other in this order; modules outside a part are below all of them.
TRANSFER_PARTS = ("", "protocol", "endpoints", "service", "memory", "streams")
TRANSFER_TOOLS = {"chaos", "simulation"}  # on top, beside each other
# Third party -> where alone it may be imported: files, or folders with a slash at the end. What is not here is refused.
THIRD_PARTIES: dict[str, tuple[str, ...]] = {
    "fastapi": ("cluster/gateway/", "cluster/gateway_server.py"),
    "starlette": ("cluster/gateway/", "cluster/gateway_server.py"),
    "uvicorn": ("cluster/gateway/", "cluster/gateway_server.py"),
    "httpx": ("cluster/cli/", "cluster/harness/", "cluster/gateway/media_fetch.py"),
    "jinja2": ("cluster/chat.py", "cluster/template_masking.py", "cluster/template_sandbox.py"),
    "prometheus_client": ("cluster/metrics.py",),
    "ray": ("cluster/actors.py", "cluster/launch.py", "cluster/ray_connection.py"),
    "packaging": ("cluster/cli/doctor.py",),
    "rich": ("cluster/cli/", "cluster/progress.py"),
    "yaml": ("cluster/yaml_files.py",),
    "pydantic": ("cluster/config.py", "cluster/gateway/", "cluster/harness/plan.py"),
    "xxhash": ("cluster/handoff.py", "cluster/router.py", "transfer/protocol/integrity.py"),
    "msgpack": ("transfer/protocol/wire.py",),
    "cryptography": ("transfer/protocol/sealing.py",),
    "zmq": (
        "transfer/endpoints/zmq_endpoint.py",
        "transfer/endpoints/zmq_sealed.py",
        "transfer/endpoints/zmq_sockets.py",
    ),
    "safetensors": ("transfer/checkpoint.py",),
    "PIL": ("embedding_worker/orientation.py", "embedding_worker/preprocess.py"),
    "tokenizers": ("language_worker/tokenizer.py",),
    "triton": ("kernels/_triton/",),
    "numpy": (
        "embedding_worker/",
        "language_worker/",
        "transfer/memory/buffers.py",
        "transfer/memory/segments.py",
        "kernels/",
    ),
    "torch": (
        "kernels/",
        "embedding_worker/",
        "language_worker/",
        "transfer/memory/buffers.py",
        "transfer/checkpoint.py",
        "transfer/checkpoint_quantised.py",
        "transfer/checkpoint_rules.py",
        "transfer/grouped_weights.py",
        "transfer/packed_layouts.py",
        "transfer/checkpoint_torch.py",
        "transfer/simulation/content.py",  # the rows that simulated producers write
        "cluster/llm.py",  # logits leave as a tensor
        "cluster/padded.py",  # so do batches, and come as such
        "cluster/cli/doctor.py",  # looks for GPUs
        "cluster/ray_connection.py",  # looks for GPUs
    ),
}
FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES = 350, 500, 60
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "dill", "cloudpickle", "shelve", "jsonpickle", "joblib"}
BANNED_CALLS = {"eval", "exec"}
BANNED_METHODS = {"recv_pyobj", "send_pyobj"}
MAY_PICKLE = "tests/"  # exceptions must survive Ray's pickling, and tests say so
ENVIRONMENT_READERS = {"cluster/__main__.py", "tests/profiles.py"}


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


PACKAGE_FILES = _files(*ARROWS)
ALL_FILES = [path for path in _files(*ARROWS, "examples", "benchmarks", "helm", "tests") if path.is_file()]


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the file; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _is_at(name: str, places: tuple[str, ...]) -> bool:
    return any(name.startswith(place) if place.endswith("/") else name == place for place in places)


def test_packages_point_only_downwards() -> None:
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for path in PACKAGE_FILES
        for line, module in _imports(_tree(path))
        if (owner := _name(path).split("/")[0]) != (top := module.split(".")[0])
        and (top in {*ARROWS, "examples", "benchmarks", "tests"} - ARROWS[owner])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_parts_of_transfer_stand_on_each_other() -> None:
    def part(module: str) -> str:
        names = module.split(".")
        return names[1] if (ROOT / "/".join(names[:2])).is_dir() else ""

    assert {p.parent.name for p in ROOT.glob("transfer/*/__init__.py")} == {*TRANSFER_PARTS[1:], *TRANSFER_TOOLS}
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for path in _files("transfer")
        for line, module in _imports(_tree(path))
        if module.startswith("transfer.")
        and (owner := part(_name(path).removesuffix(".py").replace("/", "."))) != (other := part(module))
        and (
            other in TRANSFER_TOOLS
            or (owner not in TRANSFER_TOOLS and TRANSFER_PARTS.index(other) > TRANSFER_PARTS.index(owner))
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_keeps_the_workers_apart_and_cluster_on_top() -> None:
    assert "language_worker" not in ARROWS["embedding_worker"]
    assert "embedding_worker" not in ARROWS["language_worker"]
    assert not any("cluster" in allowed for allowed in ARROWS.values())


def test_third_parties_stay_in_their_place() -> None:
    wrong = [
        f"{_name(path)}:{line} imports {module}; allowed: {THIRD_PARTIES.get(top, 'nowhere')}"
        for path in PACKAGE_FILES
        for line, module in _imports(_tree(path))
        if (top := module.split(".")[0]) not in ARROWS
        and top not in sys.stdlib_module_names
        and not _is_at(_name(path), THIRD_PARTIES.get(top, ()))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_tests_and_benchmarks_know_the_reference_implementation() -> None:
    wrong = [
        f"{_name(path)}:{line}"
        for path in (*PACKAGE_FILES, *_files("examples"))
        for line, module in _imports(_tree(path))
        if module.split(".")[0] == "transformers"
    ]
    assert not wrong, wrong


def _touches_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv", "unsetenv"}:
        return isinstance(node.value, ast.Name) and node.value.id == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in alias.name for alias in node.names)


def test_the_environment_is_read_in_one_file() -> None:
    wrong = [
        f"{_name(path)}:{getattr(node, 'lineno', 0)}"
        for path in (*PACKAGE_FILES, *_files("examples"))
        if _name(path) not in ENVIRONMENT_READERS
        for node in ast.walk(_tree(path))
        if _touches_environment(node)
    ]
    assert not wrong, wrong


def _banned(path: Path, node: ast.AST) -> str | None:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in BANNED_CALLS or name.removeprefix("builtins.") in BANNED_CALLS:
            return f"{name}()"
        if name.split(".")[-1] in BANNED_METHODS:
            return name
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            return "torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False":
            return "allow_pickle"
    return None


def test_nothing_unpickles_or_evaluates() -> None:
    wrong = []
    for path in ALL_FILES:
        name, tree = _name(path), _tree(path)
        wrong += [f"{name}:{getattr(n, 'lineno', 0)} {what}" for n in ast.walk(tree) if (what := _banned(path, n))]
        if not name.startswith(MAY_PICKLE):
            wrong += [f"{name}:{line} {m}" for line, m in _imports(tree) if m.split(".")[0] in BANNED_MODULES]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source", ["eval('1')", "builtins.exec('')", "sock.recv_pyobj()", "torch.load(f)", "np.load(f, allow_pickle=True)"]
)
def test_the_bans_catch_what_they_name(source: str) -> None:
    assert any(_banned(Path("x.py"), node) for node in ast.walk(ast.parse(source)))
    assert not any(
        _banned(Path("x.py"), n) for n in ast.walk(ast.parse("model.eval(); torch.load(f, weights_only=True)"))
    )


HAND_ROLLED = {
    "scaled_dot_product_attention", "softmax", "log_softmax", "rms_norm", "layer_norm", "silu", "gelu", "rsqrt", "bmm",
    "baddbmm", "F.linear",
}  # fmt: skip


def _hand_rolled(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls of torch that do what an op of `kernels` is for: attention, norms, activations, products."""
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and HAND_ROLLED & {called.attr, ast.unparse(called)}:
            yield called.lineno, ast.unparse(called)


def test_models_use_the_ops_of_kernels_and_roll_none_by_hand() -> None:
    models = [path for path in PACKAGE_FILES if "/models/" in _name(path)]
    wrong = [f"{_name(path)}:{line} {what}" for path in models for line, what in _hand_rolled(_tree(path))]
    assert not wrong, wrong
    assert any(module.startswith("kernels.") for path in models for _, module in _imports(_tree(path)))
    assert (
        len(list(_hand_rolled(ast.parse("F.scaled_dot_product_attention(q, k, v); torch.rsqrt(x); F.linear(x, w)"))))
        == 3
    )


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """(file:line name, number of lines) of each function."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{_name(path)}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def _num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_sizes() -> None:
    print(size_table())
    files = PACKAGE_FILES + _files("examples", "benchmarks")
    wrong = [
        f"{_name(path)}: {lines} lines, at most {limit}"
        for path in files
        if (lines := _num_lines(path))
        > (limit := KERNEL_FILE_LINES if _name(path).startswith("kernels/") else FILE_LINES)
    ]
    wrong += [
        f"{place}: {lines} lines, at most {FUNCTION_LINES}"
        for path in files
        if not _name(path).startswith("kernels/")
        for place, lines in _functions(path)
        if lines > FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is() -> None:
    missing = [_name(path) for path in PACKAGE_FILES if not ast.get_docstring(_tree(path))]
    assert not missing, missing


def _module(path: Path) -> str:
    return _name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _loaded_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; not functions, not `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _loaded_at_import(node.orelse)
            continue
        yield node
        for inner in ("body", "orelse", "finalbody"):
            yield from _loaded_at_import(getattr(node, inner, []))


def test_no_import_cycles() -> None:
    modules = {_module(path): path for path in PACKAGE_FILES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        shallow = [n for n in _loaded_at_import(_tree(path).body) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {name for _, name in _imports(ast.Module(body=list(shallow), type_ignores=[]))}
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & modules.keys()) - {module}
    assert sum(map(len, graph.values())) > 200, "the graph has edges"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def size_table() -> str:
    """Files, lines and longest functions of each package."""
    rows = [f"{'':17}{'files':>6}{'lines':>7}{'median':>7}{'max':>5}  longest file, longest function"]
    for package in (*ARROWS, "examples", "benchmarks", "tests"):
        files = _files(package)
        if not files:
            continue
        lines = {path: _num_lines(path) for path in files}
        place, longest = max((f for path in files for f in _functions(path)), key=lambda f: f[1], default=("-", 0))
        biggest = max(files, key=lines.__getitem__)
        rows.append(
            f"{package:17}{len(files):6}{sum(lines.values()):7}{statistics.median(lines.values()):7.0f}"
            f"{lines[biggest]:5}  {_name(biggest)}, {place} ({longest})"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(size_table())
