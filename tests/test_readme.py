"""The README tells the truth: its Python runs, and its tables are those of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_of_the_readme(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, comment in zip(
        done.stdout.splitlines(), re.findall(r"^print\(.*\)\s+# (\S+)", block, re.M), strict=False
    ):
        assert float(line) == pytest.approx(float(comment.rstrip(",")), rel=1e-3)


def test_readme_has_python() -> None:
    assert len(BLOCKS) >= 2


def test_tables_of_the_readme() -> None:
    script = str(ROOT / "benchmarks" / "readme.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
