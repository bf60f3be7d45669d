"""Pickles of plain values and arrays of bytes, read without running anything that they name.

CIFAR is published as pickles, and `pickle.load` runs whatever a pickle asks for. A `pickle.Unpickler` that admits
only some names still lets a file of a few bytes take all memory (the index of a memo) or all time (the hash of nested
tuples), and passes what the file says on to numpy. Here `pickletools` takes the instructions apart, the few kinds
that such files consist of are carried out, any other is refused, and arrays are put together from their bytes.

Relies on the standard library and numpy; `cifar_files` relies on it.
"""

from __future__ import annotations

import math
import pickletools
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_dictionary"]

_MOST_INSTRUCTIONS: Final = 2_000_000  # the training images of CIFAR-100 come with about 200,000

_LONGEST_KEY: Final = 64  # characters
_MOST_DIMENSIONS: Final = 4

# What arrays and, in protocol 2, the bytes of Python 3 consist of. Of numpy 2 on, `core` is `_core`.
_NAMES: Final = frozenset(
    {
        "_codecs.encode",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.numeric._frombuffer",
        "numpy.dtype",
        "numpy.ndarray",
    }
)

_INTEGERS: Final = frozenset({"BININT", "BININT1", "BININT2", "LONG1"})
_BYTES: Final = frozenset({"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"})
_TEXTS: Final = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"})
_TEXTS_OF_PYTHON_2: Final = frozenset({"BINSTRING", "SHORT_BINSTRING"})  # bytes, which pickletools reads as latin-1
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_T = TypeVar("_T")


def read_dictionary(content: bytes) -> dict[str, Any]:
    """The dictionary that a pickle holds: integers, bytes, str, None, bool, lists, dictionaries, uint8 arrays.

    Protocols 2 to 5. What Python 2 wrote as str comes back as bytes, but for the keys of dictionaries, which are
    str always.

    Raises:
        ValueError: the pickle is damaged, is no dictionary, or asks for anything else; nothing was run.
    """
    machine = _Machine(len(content))
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count == _MOST_INSTRUCTIONS:
                raise ValueError(f"more than {_MOST_INSTRUCTIONS:,} instructions")
            machine.step(opcode.name, argument)
        result = machine.pop(dict)
    except (IndexError, KeyError) as error:
        raise ValueError("instructions that do not fit one another") from error
    return {key: value.whole() if isinstance(value, _Array) else value for key, value in result.items()}


class _Name(str):
    """What a pickle names and could call; apart from str, so that no text passes for it."""

    __slots__ = ()


class _Bytes:
    """numpy's dtype of unsigned bytes, the only one."""


class _Array:
    """An array that is still to be given its shape and its bytes."""

    def __init__(self) -> None:
        self.content: NDArray[np.uint8] | None = None

    def fill(self, shape: Any, dtype: Any, fortran: Any, content: Any) -> None:
        if not isinstance(dtype, _Bytes):
            raise ValueError("an array of anything but unsigned bytes")
        if not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError("an array without a shape")
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError("an array of an impossible shape")
        if not isinstance(content, (bytes, bytearray)) or math.prod(shape) != len(content):
            raise ValueError(f"an array whose bytes do not fill its shape {str(shape)[:80]}")
        self.content = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")

    def whole(self) -> NDArray[np.uint8]:
        if self.content is None:
            raise ValueError("an array without content")
        return self.content


class _Machine:
    """The stack of an unpickler, where a mark begins a new one, and its memo.

    Texts may become bytes `encodable` times a character in all: the same text again and again would fill the memory.
    """

    def __init__(self, encodable: int) -> None:
        self.encodable = encodable
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction; the names are those of `pickletools`."""
        if name in _INTEGERS or name in _BYTES or name in _TEXTS:
            self.stack.append(argument)
        elif name in _TEXTS_OF_PYTHON_2:
            self.stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self.pop_several(_TUPLES[name])))
        else:
            self._step_by_name(name, argument)

    def _step_by_name(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.pop_to_mark()
                self.stack.append(tuple(items))
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "APPEND":
                items = self.pop_several(1)
                self.top(list).extend(items)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "SETITEM":
                items = self.pop_several(2)
                self.top(dict).update(_pairs(items))
            case "SETITEMS":
                items = self.pop_to_mark()
                self.top(dict).update(_pairs(items))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, attribute = self.pop_several(2)
                self.stack.append(_name(module, attribute))
            case "REDUCE":
                function, arguments = self.pop_several(2)
                self.stack.append(self.result(function, arguments))
            case "BUILD":
                (state,) = self.pop_several(1)
                _build(self.stack[-1], state)
            case _:
                raise ValueError(f"the instruction {name}, which is not for plain values")

    def result(self, function: Any, arguments: Any) -> Any:
        """What a call would give; nothing is called."""
        if isinstance(function, _Name) and isinstance(arguments, tuple):
            match str(function), arguments:
                case "_codecs.encode", (str() as text, "latin1") if len(text) <= self.encodable:
                    self.encodable -= len(text)
                    return text.encode("latin-1")
                case "numpy.dtype", ("u1" | "|u1" | b"u1" | b"|u1", *_):
                    return _Bytes()
                case "numpy.dtype", _:
                    raise ValueError("an array of anything but unsigned bytes")
                case "numpy.core.multiarray._reconstruct", _:
                    return _Array()
                case "numpy.core.numeric._frombuffer", (content, dtype, shape, order):
                    array = _Array()
                    array.fill(shape, dtype, order == "F", content)
                    return array
        raise ValueError("a call that makes no array of unsigned bytes")

    def top(self, kind: type[_T]) -> _T:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"something else where a {kind.__name__} must be")
        return self.stack[-1]

    def pop(self, kind: type[_T]) -> _T:
        value = self.top(kind)
        self.stack.pop()
        return value

    def pop_several(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        first = len(self.stack) - count
        items, self.stack[first:] = self.stack[first:], []
        return items

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items


def _pairs(items: list[Any]) -> dict[str, Any]:
    """Keys and values in turn. Only a short text is a key: the hash of another value could take any time."""
    keys = items[::2]
    if len(items) % 2 or not all(isinstance(key, (str, bytes)) and len(key) <= _LONGEST_KEY for key in keys):
        raise ValueError("a dictionary whose keys are not short texts")
    texts = [key.decode("latin-1") if isinstance(key, bytes) else key for key in keys]
    return dict(zip(texts, items[1::2], strict=True))


def _name(module: object, attribute: object) -> _Name:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError("a name that is not text")
    name = f"{module}.{attribute}".replace("numpy._core.", "numpy.core.")
    if name not in _NAMES:
        raise ValueError(f"the name {name[:80]!r}, which no array of bytes consists of")
    return _Name(name)


def _build(target: object, state: object) -> None:
    """Give an array its content; the state of the dtype, of single bytes, says nothing more."""
    if isinstance(target, _Array) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, content = state
        target.fill(shape, dtype, fortran, content)
    elif not isinstance(target, _Bytes):
        raise ValueError("the state of something other than an array")
