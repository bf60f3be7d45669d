"""The Python of Markdown pages, run as a reader would who pastes a page from top to bottom.

test_readme.py, test_docs.py and test_clients.py rely on it.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]


class Outcome(NamedTuple):
    """What a page leaves behind: its variables by name, and what it printed."""

    variables: dict[str, Any]
    printed: str


def blocks(page: Path, language: str) -> list[re.Match[str]]:
    """The fenced blocks of a language; group 1 is the code."""
    return list(re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))


def python_of(page: Path) -> str:
    """All Python of a page. What stands between is blank, so that line numbers are those of the page."""
    text, code, end = page.read_text(), "", 0
    for block in blocks(page, "python"):
        code += "\n" * text.count("\n", end, block.start(1)) + block[1]
        end = block.end(1)
    return code


def run(page: Path, code: str | None = None) -> Outcome:
    """Execute a page, or `code` in its place. `print(value)  # 1.5` must print 1.5, to three digits."""
    code = python_of(page) if code is None else code
    assert code, f"{page.name} has no Python"
    variables: dict[str, Any] = {"__name__": "__main__"}
    with redirect_stdout(io.StringIO()) as output:
        exec(compile(code, page, "exec"), variables)
    printed = output.getvalue()
    for line, comment in zip(
        printed.splitlines(), re.findall(r"^print\(.*\)(?: +# (\S+))?", code, re.MULTILINE), strict=False
    ):
        if comment:
            assert float(line) == pytest.approx(float(comment.rstrip(",")), rel=1e-3)
    return Outcome(variables, printed)
