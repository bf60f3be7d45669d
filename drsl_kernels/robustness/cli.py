"""The command `drsl`, also `python -m drsl_kernels.robustness`.

The commands themselves are in `commands`; this file says what to install where the packages that only they
need are missing.
"""

from __future__ import annotations

from typing import Final

__all__ = ["main"]

_EXTRAS: Final = {"click", "rich", "sklearn", "scipy", "matplotlib", "numpy"}


def main() -> None:
    try:
        from .commands import drsl
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise SystemExit(f"drsl needs the package {package!r}: pip install 'drsl_kernels[lab]'") from error
    drsl(prog_name="drsl")
