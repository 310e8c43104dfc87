"""Every Python example of the documentation runs, in the order of its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import macrobatch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """Line number and source of each ```python block."""
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


def run(text: str, name: str) -> None:
    namespace = {"__name__": "__main__"}
    for line, source in blocks(text):
        exec(compile("\n" * line + source, name, "exec"), namespace)  # a traceback shows the page's own line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path):
    run(page.read_text(encoding="utf-8"), str(page))


def test_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(macrobatch.__all__) == set(re.findall(r"^::: macrobatch\.(?:\w+\.)?(\w+)$", page, flags=re.MULTILINE))


def test_there_are_examples():
    assert {page.name for page in PAGES if blocks(page.read_text(encoding="utf-8"))} >= {"index.md", "guide.md"}


def test_a_broken_example_is_seen():
    with pytest.raises(NameError):
        run("```python\nx = 1\n```\ntext\n```python\ny = x + missing\n```\n", "page.md")
