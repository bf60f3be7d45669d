"""The text that language models learn from: read from files, cut into three contiguous parts.

The default text is one that every Python has: the modules of its own standard library. Relies on nothing but files;
`corpus` relies on it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["STDLIB", "Text", "read_text"]

STDLIB: Final = "stdlib"

# Shares of the text, from its beginning: to train on, to choose the best step with, to report.
_TRAIN: Final = 0.90
_VALIDATION: Final = 0.05


@dataclass(frozen=True)
class Text:
    """Three parts of a text, contiguous and in its order: none holds a byte of another.

    `source` says in words where it is from, `digest` is the sha256 of all of it.
    """

    source: str
    train: bytes
    validation: bytes
    test: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.train + self.validation + self.test).hexdigest()

    @staticmethod
    def of(content: bytes, source: str) -> Text:
        """The first 90 % to train on, 5 % for validation, 5 % to test; cut at ends of lines.

        A text of few lines is cut at the places themselves, wherever they lie.
        """
        first = _line_end(content, int(len(content) * _TRAIN))
        second = max(first, _line_end(content, int(len(content) * (_TRAIN + _VALIDATION))))
        return Text(source, content[:first], content[first:second], content[second:])


def read_text(where: Path | str) -> Text:
    """Read a text and cut it.

    Args:
        where: a file; a folder, of which every file is read, of folders in it, too, sorted by their paths; or
            "stdlib", the modules of this Python's standard library: the files ``*.py`` of
            ``sysconfig.get_path("stdlib")`` itself, sorted by name, without what lies in folders, as its tests do.

    The text of the standard library differs from one release of Python to the next, and results on it with it.

    Raises:
        FileNotFoundError: there is no such file or folder; the message names it.
        ValueError: there is nothing in it.
    """
    if where == STDLIB:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        source = f"the {len(files)} modules of Python's standard library"
    elif str(where) and Path(where).is_dir():  # "" is no name, and would be the current folder
        files = sorted(file for file in Path(where).rglob("*") if file.is_file())
        source = f"the {len(files)} files of {where}"
    elif Path(where).is_file():
        files, source = [Path(where)], str(where)
    else:
        raise FileNotFoundError(f"there is no text {str(where)!r}: give a file, a folder, or {STDLIB!r}")
    content = b"".join(_with_newline(file.read_bytes()) for file in files)
    if not content.strip():
        raise ValueError(f"the text {where} is empty")
    return Text.of(content, source)


def _with_newline(content: bytes) -> bytes:
    return content if content.endswith(b"\n") or not content else content + b"\n"


def _line_end(content: bytes, place: int) -> int:
    """The end of the line at `place`, unless that is far: then the place, moved behind a character of UTF-8."""
    end = content.find(b"\n", place, place + 4096) + 1
    if end:
        return end
    while place < len(content) and content[place] & 0xC0 == 0x80:
        place += 1
    return place
