"""The suite's one result file, results.json: each stage replaces its own part, whole or not at all.

Relies on nothing; all other modules of the suite rely on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "results.json"

# Words of the result that more than one module uses
PLAIN_BASE = "F.cross_entropy"
COPY = "copy"
WHOLE_LOGITS = "whole logits"
FORWARD_BACKWARD = "forward+backward"


def read(out: Path) -> dict[str, Any]:
    path = out / NAME
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def update(out: Path, **parts: Any) -> dict[str, Any]:
    """Set parts of the result. Through a file beside it, so that a broken-off run leaves the last whole one."""
    content = {**read(out), **parts}
    part = out / f"{NAME}.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(out / NAME)
    return content
