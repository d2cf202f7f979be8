"""What the pages tell users to write is accepted: configurations, commands, names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.cli.parser import build_parser
from cluster.config import GatewayConfig, build_config
from embedding_worker.config import EmbedConfig
from embedding_worker.preprocess import FORMATS, MAX_ASPECT

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
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
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
