"""The README tells the truth: its Python runs, and its tables are those of the committed results."""

from __future__ import annotations

import subprocess
import sys

from code_blocks import ROOT, run


def test_python_of_the_readme() -> None:
    run(ROOT / "README.md")


def test_tables_of_the_readme() -> None:
    script = str(ROOT / "benchmarks" / "readme.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
