"""What the pages tell users to write is accepted: configurations, commands, names."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.cli.parser import build_parser
from cluster.config import GatewayConfig, build_config
from embedding_worker.config import EmbedConfig
from embedding_worker.models import VISION_MODELS
from embedding_worker.preprocess import FORMATS, MAX_ASPECT
from language_worker.models import REGISTRY
from tests.tiny_families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def _blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in PAGES for text in pattern.findall(page.read_text(encoding="utf-8"))]


def _commands() -> list[tuple[str, str]]:
    """(page, arguments) of every `tandem ...` that a page shows, without its comment."""
    pattern = re.compile(r"\$ (?:\.venv/bin/tandem|tandem|.*python -m cluster) (.*)")
    lines = [(page, line) for page, text in _blocks("console") for line in text.splitlines()]
    return [(page, found[1].split("  #")[0].strip()) for page, line in lines if (found := pattern.match(line))]


@pytest.mark.parametrize(("page", "text"), _blocks("yaml"))
def test_configurations_are_accepted(page: str, text: str) -> None:
    assert build_config(yaml.safe_load(text)).model.path, page


def test_the_readme_shows_a_configuration() -> None:
    assert "README.md" in {page for page, _ in _blocks("yaml")}


@pytest.mark.parametrize(("page", "arguments"), _commands())
def test_commands_are_accepted(page: str, arguments: str) -> None:
    build_parser().parse_args(shlex.split(arguments))


def test_the_readme_shows_every_command_that_serves_or_answers() -> None:
    shown = {arguments.split()[0] for page, arguments in _commands() if page == "README.md"}
    assert {"demo", "generate", "doctor", "serve"} <= shown


def test_the_api_page_names_the_image_limits_as_they_are() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"^\*\*Images\*\* may be (.*?),? whatever", text, re.MULTILINE)
    assert re.split(r", | or ", said.rstrip(",")) == list(FORMATS)
    gateway, embedding = GatewayConfig(), EmbedConfig()
    assert f"`gateway.max_images_per_request` ({gateway.max_images_per_request})" in text
    assert f"`gateway.max_image_bytes` ({gateway.max_image_bytes >> 20} MiB" in text
    assert gateway.max_image_bytes == embedding.max_image_bytes
    assert f"`embedding.max_image_pixels` ({embedding.max_image_pixels // 10**6} million)" in text
    assert f"an aspect ratio of {MAX_ASPECT}" in text


def test_what_the_troubleshooting_page_quotes_is_what_is_said() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    folders = ("cluster", "transfer", "language_worker", "embedding_worker", "helm/templates", "helm/files")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".tpl", ".sh")
    ]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    quoted = [
        cell
        for line in page.splitlines()
        if line.startswith("| `")
        for cell in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert len(quoted) >= 12
    for text in quoted:
        if "Additional property" in text or text == "0/1" or text == "/ready":
            continue  # helm's and Kubernetes' own words
        pieces = re.split(r"\.\.\.|\b[A-Z]\b|'[XY]'|A-B", text)
        for piece in pieces:
            assert piece.strip(" ;,") in source, f"nobody says {piece!r}"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "helm").glob("*.md")]
    for page in pages:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in _anchors(there), f"{page.name} links to {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tests_that_pages_name_are_there() -> None:
    pattern = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
    named = [found for page in PAGES for found in pattern.findall(page.read_text(encoding="utf-8"))]
    assert len(named) >= 25
    for file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


MATRIX_HEAD = "| Family | Layouts | Images |"
THE_SAME_FOR_ALL = {
    "tests/e2e/test_families.py::test_a_video_is_refused",
    "tests/e2e/test_families.py::test_more_than_one_device_a_model_is_refused",
    "tests/cluster/gateway/test_tools.py::test_reasoning_and_calls_are_told_apart",
}
LINKED_TEST = re.compile(r"\[[^\]]+\]\(\.\./(tests/[\w/]+\.py) \"(test_[^\"]+)\"\)")


def _table(head: str) -> list[list[str]]:
    """Cells of the table of the models page whose first line begins so, headings first."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    lines = page[page.index(head) :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1, "as many cells in every row"
    return [rows[0], *rows[2:]]


def _cell_tests() -> dict[tuple[str, str], list[str]]:
    """{(family, column): the tests that back the word there}."""
    headings, *rows = _table(MATRIX_HEAD)
    column_tests = {row[0]: row[1].strip("`") for row in _table("| Column | Test |")[1:]}
    assert list(column_tests) == headings[1:]
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        names = re.findall(r"`([\w-]+)`", row[1])
        for heading, cell in zip(headings[1:], row[1:], strict=True):
            test, linked = column_tests[heading], LINKED_TEST.findall(cell)
            own = [f"{path}::{name}" for path, name in linked]
            of_names = [] if test in THE_SAME_FOR_ALL else [f"{test}[{name}]" for name in names]
            found[row[0], heading] = own or of_names or [test]
    return found


def test_every_cell_of_the_table_of_models_is_backed_by_a_test() -> None:
    """All of them are found by pytest, with the names they have there."""
    backed = _cell_tests()
    named = sorted({test for tests in backed.values() for test in tests})
    files = sorted({test.split("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = set(done.stdout.splitlines())
    missing = [f"{place}: {test}" for place, tests in backed.items() for test in tests if test not in collected]
    assert not missing, "\n".join(missing)


def test_the_table_of_models_has_every_family_and_every_architecture() -> None:
    shown = {name for row in _table(MATRIX_HEAD)[1:] for name in re.findall(r"`([\w-]+)`", row[1])}
    assert shown == set(FAMILIES)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    published = {name for name in (*REGISTRY, *VISION_MODELS) if name != "NanoChat"}  # that one is no file's word
    assert [name for name in sorted(published) if f"`{name}`" not in page] == []


def test_the_family_that_is_walked_through_is_as_the_page_says() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    quoted = re.findall(r'^ +("[\w]+": .*,)$', page, re.MULTILINE)
    files = ("language_worker/models/__init__.py", "embedding_worker/models/__init__.py", "tests/tiny_families.py")
    assert len(quoted) == 3
    assert all(line in (ROOT / file).read_text(encoding="utf-8") for line, file in zip(quoted, files, strict=True))


def test_the_training_program_of_the_page_learns() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"as it stands. -->\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"
