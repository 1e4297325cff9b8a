"""The folder of a checkpoint on disk: whole or absent, and told from everything else that may lie beside it.

`step_<number>` with at least eight digits is a checkpoint; what has any other name belongs to somebody else and is left
alone. A checkpoint is taken only if complete.json is what was written, of the step that the folder names, and each of
its files is, to the bit, the one that complete.json names; otherwise the one before it is.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.header import DTYPES
from ..files import file_hash

RECORD = "complete.json"
SEAL = "sha256"  # of the rest of the record; the checkpoints of earlier versions have none


def plain(data: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(data, default=str))


def _digest(record: dict) -> str:
    rest = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, the oldest first."""
    named = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in folder.glob("step_*"))
    return sorted((int(match[1]), path) for match, path in named if match)


def read_record(folder: Path) -> dict:
    """complete.json of a checkpoint. ValueError says what is wrong with it, FileNotFoundError that there is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{RECORD} cannot be read") from None
    if not isinstance(record, dict) or not {"step", "stage", "files", "identity", "config"} <= record.keys():
        raise ValueError("it was written by another version")
    if record.get(SEAL, _digest(record)) != _digest(record):
        raise ValueError(f"{RECORD} is not what was written")
    if record["step"] != int(folder.name[5:]):
        raise ValueError(f"{RECORD} is of step {record['step']}")
    return record


def write_record(folder: Path, record: dict) -> None:
    record = plain(record)
    (folder / RECORD).write_text(json.dumps(record | {SEAL: _digest(record)}, indent=1), encoding="utf-8")
    sync(folder / RECORD)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder, None if it is whole."""
    try:
        for name, truth in read_record(folder)["files"].items():
            if (folder / name).stat().st_size != truth["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} of {truth['bytes']} bytes"
            if file_hash(folder / name) != truth["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError as error:
        return str(error)
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there is no checkpoint at all.

    Says which ones are passed over; raises ValueError where none is left, since starting anew would bury them.
    """
    checkpoints = found(folder)
    for _, each in reversed(checkpoints):
        problem = damage(each)
        if problem is None:
            return each
        print(f"{each} is passed over: {problem}", flush=True)
    if checkpoints:
        raise ValueError(f"No checkpoint in {folder} is whole; move the folder away, or give another --run.out.")
    return None


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int | str]:
    """Write a safetensors file tensor by tensor, and hash it on the way: {"bytes", "sha256"}.

    The library takes all tensors as copies on the CPU, which a training may have no room for, and the file would have
    to be read again. Tied weights are written under each of their names. Raises OSError where the disk refuses.
    """
    # The widest first, so that each begins at a multiple of its width.
    tensors = sorted(tensors, key=lambda item: (-item[1].element_size(), item[0]))
    head, end = {}, 0
    for name, tensor in tensors:
        head[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                      "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in (struct.pack("<Q", len(text)), text, *(tensor for _, tensor in tensors)):
            if isinstance(block, Tensor):
                block = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before what follows."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and orders their names itself
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
