"""The restricted pickle reader: plain data and arrays of both Pythons come through, everything else is
refused."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import subprocess
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import safe_pickle
from pipelines.errors import InputError

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 12)
DATA = {"data": ARRAY, "labels": [1, 2], "name": b"bytes", "pair": (1.5, None), "float": np.float64(2.5)}


def python2_array(array: np.ndarray) -> bytes:
    """The opcodes that Python 2's cPickle (protocol 2) and numpy 1 wrote, as in the published CIFAR
    batches."""
    body = array.tobytes()
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05",
            b"(K\x01K" + bytes([array.shape[0]]) + b"K" + bytes([array.shape[1]]) + b"\x86q\x06",
            b"cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + len(body).to_bytes(4, "little") + body + b"tb",
            b"U\x06labels]q\x09(K\x01K\x02eu.",
        ]
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_and_arrays(protocol: int) -> None:
    if protocol == 5:  # arrays as buffers need a constructor that no published file uses
        data: dict[str, Any] = {name: value for name, value in DATA.items() if name not in ("data", "float")}
    else:
        data = DATA
    read = safe_pickle.loads(pickle.dumps(data, protocol), where="x")
    assert set(read) == set(data)
    for name, value in data.items():
        assert np.array_equal(read[name], value)
    assert "data" not in data or read["data"].dtype == np.uint8


def test_python_2_pickles() -> None:
    read = safe_pickle.loads(python2_array(ARRAY), where="x")
    assert np.array_equal(read["data"], ARRAY)
    assert read["labels"] == [1, 2]
    assert set(safe_pickle.loads(python2_array(ARRAY), where="x", encoding="bytes")) == {b"data", b"labels"}


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "echo never"), "posix.system"),
        (Runs(subprocess.Popen, ["true"]), r"\w+\.Popen"),
        (Runs(eval, "1"), r"\w+\.eval"),
        (Runs(getattr, [], "append"), r"\w+\.getattr"),
        (Runs(np.load, "x"), "numpy.load"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (np.array([1, "a"], dtype=object), "an array of object"),
        ([1, os.path.join], "posixpath.join"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_everything_else_is_refused_by_name(value: object, name: str, protocol: int) -> None:
    with pytest.raises(InputError, match=f"batch_1: refused: this pickle asks for {name}") as refused:
        safe_pickle.loads(pickle.dumps(value, protocol), where="batch_1")
    assert "only plain data and numpy arrays" in str(refused.value)


def test_codecs_other_than_latin1_are_refused() -> None:
    data = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    with pytest.raises(InputError, match="the codec 'rot13'"):
        safe_pickle.loads(data, where="x")


def test_arrays_of_another_type_are_refused() -> None:
    with pytest.raises(InputError, match="an array of 1"):
        safe_pickle.loads(b"cnumpy.core.multiarray\n_reconstruct\n(I1\n(I1\ntS'b'\ntR.", where="x")


def test_persistent_objects_are_refused() -> None:
    with pytest.raises(InputError, match=r"an external object \('a'\)"):
        safe_pickle.loads(b"Pa\n.", where="x")


def test_dotted_names_do_not_reach_further() -> None:
    data = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    with pytest.raises(InputError, match=r"numpy.ndarray.tofile"):
        safe_pickle.loads(data, where="x")


@given(st.data())
def test_damage_is_an_input_error(data: st.DataObject) -> None:
    content = bytearray(pickle.dumps(DATA, 2))
    content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InputError):
        safe_pickle.loads(bytes(content), where="x")


class _Own:
    pass


@pytest.mark.parametrize("name", ["numpy\ndtype", "ours\nfunction", "ours\nOwn"])
def test_a_pickle_cannot_change_what_it_was_given(name: str) -> None:
    """The opcode BUILD sets attributes: here `__doc__`, of whatever stands before it."""
    program = f"c{name}\n".encode() + b"(NVchanged\n".replace(b"(NV", b"(N}V__doc__\nV") + b"stb."
    more = {("ours", "function"): _own_function, ("ours", "Own"): _Own}
    before = safe_pickle._dtype.__doc__, _own_function.__doc__, _Own.__doc__
    with contextlib.suppress(InputError):
        safe_pickle.loads(program, where="x", more=more)
    assert (safe_pickle._dtype.__doc__, _own_function.__doc__, _Own.__doc__) == before


def _own_function() -> None:
    """As it was."""


def test_more_memory_than_there_is() -> None:
    class Huge:
        def __reduce__(self) -> Any:
            return np._core.multiarray._reconstruct, (np.ndarray, (1 << 50,), b"b")

    with pytest.raises(InputError, match="it asks for more memory than there is"):
        safe_pickle.loads(pickle.dumps(Huge()), where="x")
