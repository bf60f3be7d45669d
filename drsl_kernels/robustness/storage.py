"""Files that are either whole or absent. Whatever writes results relies on it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["clear_unfinished", "read_json", "set_aside", "write_atomically", "write_json", "write_text"]


# No file takes so long to write, in seconds: an unfinished one that is older was left by a process that was killed.
_LEFT_BEHIND: Final = 3600.0

_UNFINISHED: Final = re.compile(r"\.unfinished-\d+-.+")  # of `write_atomically`


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place in one move.

    A reader sees the old file or the new one, never a part of it; if `write` fails, the old one stays and the
    temporary file is removed. Once this returns the new one is on the disk.
    """
    temporary = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)  # the new name, too


def clear_unfinished(folder: Path, *, sole_use: bool = False) -> None:
    """Remove what killed processes have left in a folder, and nothing that another process may be writing.

    With `sole_use` there is no other process, and what is left behind may be young.
    """
    for path in folder.iterdir():
        if not _UNFINISHED.fullmatch(path.name) or not path.is_file():
            continue
        try:
            if sole_use or time.time() - path.stat().st_mtime > _LEFT_BEHIND:
                path.unlink()
        except FileNotFoundError:  # another process has finished or removed it
            continue


def write_json(path: Path, content: object) -> None:
    """Write JSON that any reader accepts: NaN and infinity are errors."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    write_atomically(path, lambda temporary: _fill(temporary, text))


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file or it is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def set_aside(folder: Path, names: Sequence[str]) -> Path | None:
    """Move what there is of these, in their order, into a new folder replaced-N of `folder`, and return that."""
    found = [name for name in names if (folder / name).exists()]
    if not found:
        return None
    earlier = (place.name.partition("-")[2] for place in folder.glob("replaced-*"))
    place = folder / f"replaced-{1 + max((int(number) for number in earlier if number.isdecimal()), default=0)}"
    place.mkdir()
    for name in found:
        os.replace(folder / name, place / name)
    return place


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
