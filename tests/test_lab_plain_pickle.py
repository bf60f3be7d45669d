"""Pickles of plain values and byte arrays, whoever wrote them; everything else is refused, and nothing is run."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from drsl_kernels.robustness import plain_pickle
from drsl_kernels.robustness.plain_pickle import read_dictionary


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes what cPickle of Python 2 wrote with protocol 2, as the published files are: str as bytes."""

    def save_text(self, value: str | bytes) -> None:
        content = value.encode("latin-1") if isinstance(value, str) else value
        short = len(content) < 256
        self.write((b"U" + bytes([len(content)]) if short else b"T" + struct.pack("<i", len(content))) + content)
        self.memoize(value)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_text, str: save_text}  # type: ignore[attr-defined]


def by_python_2(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def by_python_3(protocol: int) -> Callable[[object], bytes]:
    return lambda value: pickle.dumps(value, protocol=protocol)


def by_older_numpy(value: object) -> bytes:
    return pickle.dumps(value, protocol=2).replace(b"cnumpy._core.", b"cnumpy.core.")


WRITERS = {
    "python 2": by_python_2,
    "older numpy": by_older_numpy,
    **{f"protocol {n}": by_python_3(n) for n in (2, 3, 4, 5)},
}


BYTES = np.arange(12, dtype=np.uint8).reshape(2, 6)
SMALL = {
    b"data": BYTES,
    b"labels": [3, 400, 70_000, -1],
    b"names": [b"a", b"b"],
    b"more": {b"none": None, b"yes": True},
}
every_writer = pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))


@every_writer
def test_plain_values(writer: Callable[[object], bytes]) -> None:
    found = read_dictionary(writer(SMALL))
    assert np.array_equal(found.pop("data"), BYTES)
    assert found == {"labels": [3, 400, 70_000, -1], "names": [b"a", b"b"], "more": {"none": None, "yes": True}}


@every_writer
def test_many_values(writer: Callable[[object], bytes]) -> None:
    """Picklers write lists a thousand at a time, remember what comes again, and count memos beyond one byte."""
    names = [b"%d" % (k % 700) for k in range(2500)]
    assert read_dictionary(writer({b"names": names, b"labels": list(range(2500))})) == {
        "names": names,
        "labels": list(range(2500)),
    }


def test_the_writer_writes_what_python_2_wrote() -> None:
    """The first bytes of the published files, and what Python's own pickle makes of the whole."""
    written = by_python_2(
        {b"batch_label": b"training batch 1 of 5", b"data": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    )
    assert written.startswith(b"\x80\x02}q\x00(U\x0bbatch_labelq\x01U\x15training batch 1 of 5q\x02U\x04data")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in written
    assert b"U\x06\0\1\2\3\4\5" in written
    unpickled = pickle.loads(written, encoding="bytes")
    assert unpickled[b"data"].tolist() == [[0, 1, 2], [3, 4, 5]]


@every_writer
def test_arrays_in_the_order_of_fortran(writer: Callable[[object], bytes]) -> None:
    array = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert read_dictionary(writer({b"data": array}))["data"].tolist() == array.tolist()


@every_writer
def test_cut_anywhere(writer: Callable[[object], bytes]) -> None:
    whole = writer(
        {b"data": np.arange(12, dtype=np.uint8).reshape(2, 6), b"labels": [3, 4], b"filenames": [b"a", b"b"]}
    )
    read_dictionary(whole)
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"."):
            read_dictionary(whole[:length])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools, of a text that makes no sense
@every_writer
def test_changed_anywhere(writer: Callable[[object], bytes]) -> None:
    """Either it is a dictionary of plain values still, or the error is the one that is announced."""
    whole = writer(
        {b"data": np.arange(12, dtype=np.uint8).reshape(2, 6), b"labels": [3, 4], b"filenames": [b"a", b"b"]}
    )
    chance = random.Random(0)
    outcomes = set()
    for _ in range(1500):
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            changed[chance.randrange(len(whole))] = chance.randrange(256)
        try:
            outcomes.add(type(read_dictionary(bytes(changed))))
        except ValueError:
            outcomes.add(ValueError)
    assert outcomes == {dict, ValueError}


class Call:
    """Pickled as the call of a function, which `pickle.loads` would make."""

    def __init__(self, function: Any, *arguments: object, state: object = None) -> None:
        self.call = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def under_a_key(instructions: bytes) -> bytes:
    """A dictionary with what these instructions leave on the stack."""
    return b"\x80\x04}(X\x01\0\0\0x" + instructions + b"u."


class TestHostile:
    @pytest.fixture
    def trap(self, tmp_path: Path) -> Any:
        """A file that must never come to be."""
        path = tmp_path / "run"
        yield path
        assert not path.exists()

    @pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
    def test_a_call(self, trap: Path, protocol: int) -> None:
        call = pickle.dumps({b"data": Call(os.mkdir, str(trap))}, protocol=protocol)
        with pytest.raises(ValueError, match=r"name .*mkdir|instruction"):
            read_dictionary(call)
        pickle.loads(call)
        trap.rmdir()  # so the pickle was a real one

    @pytest.mark.parametrize("function", [eval, exec, os.system, builtins.__import__, getattr, collections.OrderedDict])
    def test_names(self, function: Any) -> None:
        for protocol in (2, 4):
            with pytest.raises(ValueError, match=r"the name '.*', which no array of bytes consists of"):
                read_dictionary(pickle.dumps({"x": Call(function)}, protocol=protocol))

    @pytest.mark.parametrize(
        "instructions",
        [
            b"(S'/nowhere'\nios\nmkdir\n",  # INST
            b"(cos\nmkdir\nX\x08\0\0\0/nowhereo",  # OBJ
            b"cos\nmkdir\nX\x08\0\0\0/nowhere\x85\x81",  # NEWOBJ
            b"X\x02\0\0\0osX\x05\0\0\0mkdir\x93",  # STACK_GLOBAL
            b"Pnowhere\n",  # PERSID
            b"K\x01Q",  # BINPERSID
            b"\x82\x01",  # EXT1
            b"cnumpy.core.multiarray\n_reconstruct\n(tR",  # allowed names, wrong arguments
            b"cnumpy\ndtype\nX\x02\0\0\0O8K\0K\x01\x87R",
            b"cnumpy\nndarray\n(K\x09\x85tR",
            b"c_codecs\nencode\nX\x01\0\0\0xX\x03\0\0\0zip\x86R",  # a codec other than latin1
            b"X\x0e\0\0\0_codecs.encodeX\x01\0\0\0xX\x06\0\0\0latin1\x86R",  # a text in the place of a name
            b"]K\x01b",  # the state of a list
            b"]K\x01K\x01s",  # a list as a dictionary
            b"}K\x01a",  # a dictionary as a list
            b"}K\x01K\x01s",  # a key that is a number
            b"h\x07",  # a memo that was never made
            b"0" * 9,  # POP
            b"e" * 9,  # more marks closed than were opened
        ],
    )
    def test_instructions(self, instructions: bytes) -> None:
        with pytest.raises(ValueError, match=r"."):
            read_dictionary(under_a_key(instructions))

    @pytest.mark.parametrize(
        "state",
        [
            (1, (2, 6), "u1", False, bytes(12)),
            (1, (2, 7), np.dtype("u1"), False, bytes(12)),
            (1, (2, -6), np.dtype("u1"), False, bytes(12)),
            (1, (-2, -6), np.dtype("u1"), False, bytes(12)),
            (1, (0, 2**62), np.dtype("u1"), False, b""),
            (1, (True, 12), np.dtype("u1"), False, bytes(12)),
            (1, 12, np.dtype("u1"), False, bytes(12)),
            (1, (1,) * 30 + (12,), np.dtype("u1"), False, bytes(12)),
            (1, (2, 6), np.dtype("u1"), False, [0] * 12),
            (1, (2, 6), np.dtype("u2"), False, bytes(24)),
            (1, (2, 6), np.dtype(object), False, bytes(96)),
            (1, (2, 6), np.dtype("u1")),
            None,
        ],
        ids=str,
    )
    def test_states_of_an_array(self, state: object) -> None:
        """With protocol 3, whose bytes are no calls."""
        function, arguments, _ = BYTES.__reduce__()
        good = Call(function, *arguments, state=(1, (2, 6), np.dtype("u1"), False, bytes(12)))
        assert read_dictionary(pickle.dumps({"x": good}, protocol=3))["x"].shape == (2, 6)
        with pytest.raises(ValueError, match=r"^(an array|the state of something)"):
            read_dictionary(pickle.dumps({"x": Call(function, *arguments, state=state)}, protocol=3))

    def test_all_memory_by_an_index(self) -> None:
        """`pickle.loads` makes a table as long as the largest index of the memo: 64 GB here."""
        assert read_dictionary(under_a_key(b"Nr" + b"\xff" * 4))["x"] is None

    def test_all_time_by_a_hash(self) -> None:
        """The hash of 60 tuples, each of which holds the one before twice, takes 2^60 steps."""
        nested = b")q\0" + b"".join(b"h%c\x86q%c" % (k, k + 1) for k in range(60))
        assert len(read_dictionary(under_a_key(nested))["x"]) == 2
        for instructions in (b"}" + nested + b"Ns", nested + b"N", b"c_codecs\nencode\n" + nested + b"R"):
            with pytest.raises(ValueError, match=r"."):
                read_dictionary(under_a_key(instructions))
        for call in (b"\x93", b"h\x3c\x93"):  # as the name of something, which is put into words
            with pytest.raises(ValueError, match=r"."):
                read_dictionary(under_a_key(nested + call))

    def test_all_memory_by_the_same_text_again(self) -> None:
        """A megabyte, encoded ten thousand times."""
        text = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20
        once = b"h\1h\0h\2\x86R"
        start = text + b"q\0" + b"c_codecs\nencode\nq\1X\6\0\0\0latin1q\2"
        assert len(read_dictionary(under_a_key(b"(" + start + once + b"t"))["x"][-1]) == 2**20
        with pytest.raises(ValueError, match="a call that makes no array of unsigned bytes"):
            read_dictionary(under_a_key(b"(" + start + once * 10_000 + b"t"))

    def test_lengths_beyond_the_file(self) -> None:
        for instruction in (b"B" + b"\xff" * 4, b"\x8e" + b"\x7f" * 8, b"\x96" + b"\x7f" * 8, b"T\xff\xff\xff\x7f"):
            with pytest.raises(ValueError, match=r"expected \d+ bytes"):
                read_dictionary(under_a_key(instruction))

    def test_too_many_instructions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plain_pickle, "_MOST_INSTRUCTIONS", 1000)
        with pytest.raises(ValueError, match="more than 1,000 instructions"):
            read_dictionary(under_a_key(b"(" + b"]" * 1000 + b"t"))

    def test_long_keys(self) -> None:
        with pytest.raises(ValueError, match="a dictionary whose keys are not short texts"):
            read_dictionary(pickle.dumps({"x" * 65: 1}))
