"""The folder of a checkpoint on disk: whole or absent, and distinct from anything else beside it.

`step_<number>` with at least eight digits is a checkpoint. A folder of any other name is left alone. A checkpoint is
taken only if complete.json is unaltered, its step is that of the folder's name, and each file matches its hash in
complete.json. Otherwise the checkpoint before it is taken.
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
SEAL = "sha256"  # hash of the rest of the record; checkpoints of earlier versions have none


def plain(data: Any) -> Any:
    """The data as it comes back from JSON."""
    return json.loads(json.dumps(data, default=str))


def _digest(record: dict) -> str:
    rest = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, the oldest first."""
    named = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in folder.glob("step_*"))
    return sorted((int(match[1]), path) for match, path in named if match)


def read_record(folder: Path) -> dict:
    """The complete.json of a checkpoint. ValueError says what is wrong with it, FileNotFoundError that there is
    none."""
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

    Prints which ones are passed over. Raises ValueError where none is left, because a new start would bury them.
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
    """Write a safetensors file tensor by tensor and hash it on the way: {"bytes", "sha256"}.

    The library needs copies of all tensors on the CPU, for which a training may lack memory, and the file would have to
    be read again for its hash. Tied weights are written under each of their names. Raises OSError where the disk
    refuses.
    """
    # The widest dtype comes first, so that each tensor begins at a multiple of its width.
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
    """Flush a file, or the names in a folder, to the disk before what follows."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders and flushes their names itself
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
