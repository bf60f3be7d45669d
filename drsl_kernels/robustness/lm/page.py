"""The comparison of language models as a page to read: Markdown, and HTML in one file with every picture inside.

Relies on `report`, `pictures` and `..page_parts`; the command relies on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

from ..identity import environment
from ..page_parts import STYLE, html_figure, html_list, html_table, markdown_table
from ..storage import write_text
from .experiment import LanguageComparison
from .pictures import PICTURES
from .report import cautions, each_attack, explanation, table

__all__ = ["PAGES", "write_pages"]

PAGES: Final = ("report.md", "report.html")

_TITLE: Final = "Language models under attack"
_FIRST: Final = "What to keep in mind first:"
_EACH: Final = "Each attack alone, perplexity"
_WRITTEN: Final = "What the models write"
_AFTER: Final = "The first half of the first attacked sequence, then 200 tokens drawn from the model of the first seed."


def write_pages(comparison: LanguageComparison, folder: Path) -> None:
    """Write `PAGES` into the folder that holds the pictures already, each whole or not at all."""
    head, *rows = table(comparison)
    software = "; ".join(f"{what} {value}" for what, value in environment().items())
    meaning = [*(f"{what}: {words}" for what, words in explanation(comparison).items()), f"made with: {software}"]
    samples = {str(loss): comparison.of(loss)[0].sample for loss in comparison.losses}
    parts = (list(cautions(comparison)), head, rows, meaning, each_attack(comparison), samples)
    write_text(folder / PAGES[0], _markdown(*parts))
    write_text(folder / PAGES[1], _html(*parts, folder))


def _markdown(
    said: Sequence[str],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    meaning: Sequence[str],
    each: Sequence[Sequence[str]],
    samples: Mapping[str, str],
) -> str:
    lines = [f"# {_TITLE}", "", _FIRST, "", *(f"- {words}" for words in said), ""]
    lines += [*markdown_table(head, rows), "", *(f"- {words}" for words in meaning), ""]
    lines += [f"## {_EACH}", "", *markdown_table(each[0], each[1:]), ""]
    for name, caption in PICTURES.items():
        lines += [f"![{caption}]({name})", ""]
    lines += [f"## {_WRITTEN}", "", _AFTER, ""]
    for loss, sample in samples.items():  # indented, no character in it means anything
        lines += [f"{loss}:", "", *(f"    {line}" for line in sample.splitlines()), ""]
    return "\n".join(lines)


def _html(
    said: Sequence[str],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    meaning: Sequence[str],
    each: Sequence[Sequence[str]],
    samples: Mapping[str, str],
    folder: Path,
) -> str:
    figures = "".join(html_figure(folder / name, caption) for name, caption in PICTURES.items())
    written = "".join(f"<h3>{escape(loss)}</h3><pre>{escape(sample)}</pre>" for loss, sample in samples.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(_TITLE)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(_TITLE)}</h1>\n<p>{_FIRST}</p>{html_list(said)}\n"
        f"{html_table(head, rows)}\n{html_list(meaning)}\n"
        f"<h2>{escape(_EACH)}</h2>{html_table(each[0], each[1:])}\n{figures}\n"
        f"<h2>{_WRITTEN}</h2><p>{_AFTER}</p>{written}\n</body></html>\n"
    )
