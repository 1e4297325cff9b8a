"""A safetensors header must account for every byte of its file, and say nothing twice."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from semantic_diffusion_adapter.kernels import header


def write(path, entries: dict | bytes, data: bytes) -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.ones((), dtype=torch.float16),
        "none": torch.ones(0, 4),
        "c": torch.ones(5, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "a", metadata={"x": "y"})
    read = header.read(tmp_path / "a")
    assert read.metadata == {"x": "y"} and read.tensor_bytes == 24 + 2 + 5
    assert {name: (e.dtype, e.shape) for name, e in read.tensors.items()} == {
        "a": ("F32", (2, 3)), "b": ("F16", ()), "none": ("F32", (0, 4)), "c": ("BOOL", (5,)),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [d for d in header.DTYPES])
def test_dtypes_are_spelt_as_the_library_spells_them(tmp_path, dtype):
    save_file({"x": torch.ones(2).to(dtype)}, tmp_path / "a")
    assert header.read(tmp_path / "a").tensors["x"].dtype == header.DTYPES[dtype]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "overlapping bytes before the tensor 'b'"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, "unclaimed bytes before the tensor 'b'"),
        ({"a": entry(0, 8, [2])}, "4 bytes that belong to no tensor"),
        ({}, "12 bytes that belong to no tensor"),
        ({"a": entry(0, 12, [2])}, r"12 bytes, which is not what F32 \[2\] takes"),
        ({"a": entry(0, 12, [6])}, "12 bytes, which is not what"),
        ({"a": entry(12, 0, [3])}, "bytes before the tensor 'a'"),
        ({"a": entry(0, 16, [4])}, "cut short"),
        ({"a": entry(-12, 0, [3])}, "says -12 for 'a.data_offsets.0'"),
        ({"a": entry(0, 12, [3], "F33")}, "says 'F33' for 'a.dtype'"),
        ({"a": entry(0, 12, [-3])}, "says -3 for 'a.shape.0'"),
        ({"a": entry(0, 12, [3.0])}, "says 3.0 for 'a.shape.0'"),
        ({"a": entry(0, 12, [True])}, "says True for 'a.shape.0'"),
        ({"a": entry(0, 12, [3] + [1] * 9)}, "for 'a.shape'"),
        ({"a": entry(0, 12, [0, 2**60])}, "for 'a.shape.1'"),
        ({"a": entry(0, 12, [3]) | {"more": 1}}, "has the field 'a.more'"),
        ({"a": {"dtype": "F32", "shape": [3]}}, "lacks 'a.data_offsets'"),
        ({"a": 3}, "says 3 for 'a'"),
        ({"a": entry(0, 12, [3]), "__metadata__": {"x": 3}}, "says 3 for 'x'"),
        ({"a": entry(0, 12, [3]), "__metadata__": 3}, "says 3"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "a": {}}', "names 'a' twice"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "number 'NaN'"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"a": 1', "JSON is broken"),
    ],
)
def test_a_header_that_contradicts_itself_or_its_file_is_one_sentence(tmp_path, entries, message):
    write(tmp_path / "a", entries, bytes(12))
    with pytest.raises(ValueError, match=message) as caught:
        header.read(tmp_path / "a")
    text = str(caught.value)
    assert str(tmp_path / "a") in text and text.endswith(".") and "\n" not in text and type(caught.value) is ValueError


def test_a_header_beyond_reason_is_not_parsed(tmp_path):
    write(tmp_path / "a", {str(i): {} for i in range(20_001)}, b"")
    with pytest.raises(ValueError, match="has 20001 tensors where 20000 are the most"):
        header.read(tmp_path / "a")
    write(tmp_path / "a", b"{" + b" " * 2**24 + b"}", b"")
    with pytest.raises(ValueError, match="has a header of 16777218 bytes where 16777216 are the most"):
        header.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}")
    with pytest.raises(ValueError, match="cut short"):
        header.read(tmp_path / "a")
