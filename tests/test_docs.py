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
