"""Half the time of Triton's interpreter, for the tests: what it does again at every call of a device function, once.

The interpreter replaces the functions of `triton.language` when a kernel starts, and does so again for each function
that the kernel calls. conftest.py calls `speed_up`; without it everything works, slower.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


class _NothingToRestore:
    def restore(self) -> None:
        pass


def speed_up() -> None:
    """Replace the language's functions once per kernel and set of modules that its functions see."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[tuple[bool, bool]] = set()

    def patch_once(fn: Any) -> Any:
        modules = list(map(id, fn.__globals__.values()))
        seen = (id(interpreter.tl) in modules, id(interpreter.tl.core) in modules)
        if seen in replaced:
            return _NothingToRestore()
        replaced.add(seen)
        return patch(fn)

    def launch_afresh(self: Any, *arguments: Any, **keywords: Any) -> Any:
        replaced.clear()
        return launch(self, *arguments, **keywords)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
