"""The header of a safetensors file, checked against the size of the file before a byte of a tensor is read.

The format: 8 bytes length, that many bytes of JSON, then the tensors' bytes without a gap. The JSON names for every
tensor its dtype, its shape and where it begins and ends; `__metadata__` holds text.
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Len

from . import schema

# The format allows 100 MB of header. Most of a large one is a workflow; the largest public files have some thousand
# tensors.
MAX_BYTES = 2**24
MAX_TENSORS = 20_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64,
    "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# What our own files store.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_Size = schema.whole(0, 2**40)


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor.

    data_offsets: its first byte and the one after its last, counted from the end of the header.
    """

    __pydantic_config__ = schema.CLOSED

    dtype: Literal[tuple(_BITS)]
    shape: Annotated[tuple[_Size, ...], Len(0, 8)]
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True)
class Header:
    metadata: dict[str, str]
    tensors: dict[str, Entry]
    tensor_bytes: int


def read(path: str | os.PathLike) -> Header:
    """The header of a safetensors file.

    ValueError in one sentence: no such file, no safetensors, cut short, contradicting.
    """
    if "\0" in os.fspath(path):
        raise ValueError(f"The file name {os.fspath(path)!r} has a NUL character: choose another file.")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            text = file.read(min(length, MAX_BYTES))
    except FileNotFoundError as error:
        raise ValueError(f"There is no checkpoint at {path}: put the file there or choose another.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error
    if not text.startswith(b"{"):
        raise ValueError(f"{path} is not a safetensors file: only safetensors checkpoints are loaded.")
    if 8 + length > size:
        raise ValueError(f"{path} is cut short: download or export it again.")
    if length > MAX_BYTES:
        raise ValueError(f"{path} has a header of {length} bytes where {MAX_BYTES} are the most: choose another file.")
    try:
        header = schema.read_json(text)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}): only safetensors checkpoints are loaded."
        ) from error
    what = f"The header of {path}"
    metadata = schema.parse(dict[str, str], header.pop("__metadata__", {}), what)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{path} has {len(header)} tensors where {MAX_TENSORS} are the most: choose another file.")
    tensors = schema.parse(dict[str, Entry], header, what)
    _check_bytes(tensors, size - 8 - length, path)
    return Header(metadata, tensors, size - 8 - length)


def _check_bytes(tensors: dict[str, Entry], size: int, path: str | os.PathLike) -> None:
    """Every byte belongs to exactly one tensor, and every tensor has as many as its dtype and shape take."""
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if end > size:
            raise ValueError(f"{path} is cut short: download or export it again.")
        if begin != at:
            raise ValueError(f"{path} has {'overlapping' if begin < at else 'unclaimed'} bytes before the tensor "
                             f"{schema.short(name)}: download or export it again.")  # fmt: skip
        if (end - begin) * 8 != math.prod(entry.shape) * _BITS[entry.dtype]:
            raise ValueError(
                f"The tensor {schema.short(name)} in {path} has {end - begin} bytes, which is not what {entry.dtype} "
                f"{list(entry.shape)} takes: download or export it again."
            )
        at = end
    if at != size:
        raise ValueError(f"{path} has {size - at} bytes that belong to no tensor: download or export it again.")
