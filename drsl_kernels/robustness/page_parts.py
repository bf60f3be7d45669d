"""What pages of results are put together from: a style, tables and lists in Markdown and HTML, pictures in the HTML.

Relies on nothing of this package; `page` and the pages of `lm` rely on it.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

__all__ = ["STYLE", "html_figure", "html_list", "html_table", "markdown_table"]

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #bbb; padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
figure { margin: 2rem 0; } figcaption { color: #555; }
"""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def html_list(all_words: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(words)}</li>" for words in all_words) + "</ul>"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead>{cells}</thead><tbody>{body}</tbody></table>"


def html_figure(path: Path, caption: str) -> str:
    """A picture and its caption, in the page itself."""
    data = b64encode(path.read_bytes()).decode("ascii")
    words = escape(caption, quote=True)
    image = f'<img alt="{words}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>\n"
