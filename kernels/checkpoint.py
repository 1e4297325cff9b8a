"""Checkpoint files: safetensors with one JSON record that says what the file is.

The record is the value of the safetensors metadata key ``sda``. It always has ``format_version``, ``kind`` and
``config``; other fields (hierarchy, widths, towers, base_sha256, step, licence, ...) are kept as given. Every reader
checks the record before it touches a tensor. Every refusal is one sentence that names the file and the remedy.

``digest`` (files from before it was written have none) holds two BLAKE2b hashes. ``layout``, of the record and of the
names, dtypes and shapes of the tensors, is checked whenever the record is read. ``content``, of the tensors' bytes, is
checked on loading up to QUICK bytes, beyond that on request (`verify`). They find damage; they prove nothing about who
made a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import header, schema
from .replace import replacing
from .storage import SCALE_SUFFIX, check_storage, finite, pack, unpack

FORMAT_VERSION = 1
RECORD_KEY = "sda"
KINDS = ("adapter", "edit_decoder", "vision_tower", "flux", "vae", "text_encoder", "embedding", "gate_lora")
QUICK = 2**28  # bytes that any machine hashes in less than a second
_MAX_RECORD = 2**20  # characters; the largest part of a real one, a thumbnail, is a tenth


class Digest(schema.Closed):
    layout: str
    content: str


class Widths(BaseModel):
    """Channels of the text space and of the pooled vector, null where there is none."""

    text: schema.Width
    pooled: schema.Width | None


class Record(BaseModel):
    """What every record says, and what some say and the nodes read. None stands for a field that is not there."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    format_version: schema.whole(1, 2**63)
    kind: str
    config: dict[str, Any]
    hierarchy: schema.Levels = None
    widths: Widths = None
    digest: Digest = None


def save(
    path: str | os.PathLike,
    state_dict: dict[str, Tensor],
    kind: str,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
    **fields: Any,
) -> None:
    """Write a checkpoint in one step: a temporary file beside it, then one rename.

    dtype: storage of the floating tensors: None keeps each as it is, a floating dtype casts, ``torch.int8`` stores
        every floating tensor of two or more dimensions as int8 with one float32 scale per row (``<name>::scale``, so
        that rows of any magnitude keep seven bits) and the others as float16.
    metadata: text for other readers, put beside the record (a ComfyUI page finds `workflow` there).
    fields: further entries of the record, JSON only.
    Raises ValueError for an unknown kind, a reserved field, a tensor or number that is not finite, a dtype that is not
    stored, or a file that cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"Cannot save a checkpoint of kind {kind!r}: use one of {', '.join(KINDS)}.")
    if "\0" in os.fspath(path):
        raise ValueError(f"The file name {os.fspath(path)!r} has a NUL character: choose another name.")
    reserved = {"format_version", "kind", "config", "digest"} & fields.keys()
    if reserved:
        raise ValueError(f"The checkpoint field {sorted(reserved)[0]!r} is reserved: choose another name.")
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state_dict.items():
        if name.endswith(SCALE_SUFFIX):
            raise ValueError(f"The tensor name {name!r} ends with the reserved suffix {SCALE_SUFFIX!r}: rename it.")
        tensor = tensor.detach().cpu()
        if tensor.dtype not in header.DTYPES or tensor.dtype == torch.int8:  # that is what `pack` makes
            raise ValueError(
                f"The tensor {name!r} is {tensor.dtype}, which checkpoints do not store: convert it first."
            )
        if not finite(tensor):
            raise ValueError(f"The tensor {name!r} has NaN or infinite values: the checkpoint {path} was not written.")
        for key, value in pack(name, tensor, dtype).items():
            value = value.contiguous()
            # safetensors refuses tensors that share memory (tied weights): store such a one twice.
            memory = value.untyped_storage().data_ptr()
            stored[key] = value.clone() if memory in seen else value
            seen.add(memory)
    record = {"format_version": FORMAT_VERSION, "kind": kind, "config": config, **fields}
    try:
        record = schema.read_json(json.dumps(record))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"The record of {path} cannot be written ({error}): it takes JSON and finite numbers only."
        ) from error
    table = {name: (header.DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()}
    text = json.dumps(
        record | {"digest": {"layout": _layout(record, table), "content": _content(stored)}}, sort_keys=True
    )
    metadata = {**(metadata or {}), RECORD_KEY: text}
    if len(text) > _MAX_RECORD or len(json.dumps(metadata)) > header.MAX_BYTES // 2:
        raise ValueError(
            f"{path} was not written (its record or workflow is too long to be read again): make the workflow smaller."
        )
    try:
        with replacing(Path(path)) as temporary:
            save_file(stored, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path} was not written ({reason}): make room on the disk or choose another folder."
        ) from error


def read_header(path: str | os.PathLike, kind: str | None = None) -> dict[str, Any]:
    """The record of a checkpoint (of this kind), read without loading a tensor.

    ValueError in one sentence if it will not do.
    """
    return _read(path, kind)[0]


def read_table(path: str | os.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """`read_header`, and the dtype (as the header spells it) and shape of every tensor as stored."""
    record, table, _ = _read(path, kind)
    return record, table


def _read(
    path: str | os.PathLike, kind: str | None
) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]], Digest | None]:
    """The record without its digest, the table of the tensors, and the digest."""
    head = header.read(path)
    text = head.metadata.get(RECORD_KEY)
    if text is None:
        raise ValueError(f"{path} has no Semantic Diffusion Adapter record: choose a file that this pack made.")
    if len(text) > _MAX_RECORD:
        raise ValueError(
            f"The record in {path} has {len(text)} characters where {_MAX_RECORD} are the most: choose another file."
        )
    try:
        record = schema.read_json(text)
    except ValueError as error:
        raise ValueError(f"The record in {path} is damaged ({error}): download or export the file again.") from error
    version = record.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {schema.short(version)} and this pack reads up to {FORMAT_VERSION}: update the pack."
        )
    typed = schema.parse(Record, record, f"The record in {path}")
    if kind not in (None, typed.kind):
        raise ValueError(
            f"{path} holds a checkpoint of kind {schema.short(typed.kind)} where {kind!r} is needed: choose another file."
        )
    record.pop("digest", None)
    table = {name: (entry.dtype, entry.shape) for name, entry in head.tensors.items()}
    if typed.digest is not None and typed.digest.layout != _layout(record, table):
        raise ValueError(
            f"{path} is not as it was saved (its record, or a tensor's name, dtype or shape, was changed): download or export "
            "it again."
        )
    check_storage(table, typed.digest is not None or typed.kind == "embedding", path)
    return record, table, typed.digest


def has_record(path: str | os.PathLike) -> bool:
    """Whether a safetensors file carries our record; public weights (vision towers) do not."""
    return RECORD_KEY in header.read(path).metadata


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict on the CPU, record) of a checkpoint of this kind; int8 tensors come back as float32.

    Raises ValueError in one sentence: no safetensors file, truncated, no record, newer version, another kind, dtypes
    that the format does not store, not finite, and up to QUICK bytes changed numbers.
    """
    record, _, digest = _read(path, kind)
    stored = load_tensors(path)
    if digest is not None and sum(tensor.nbytes for tensor in stored.values()) <= QUICK:
        _check_content(stored, digest, path)
    tensors = {name: unpack(stored, name) for name in stored if not name.endswith(SCALE_SUFFIX)}
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise ValueError(
                f"The tensor {schema.short(name)} in {path} has NaN or infinite values: download or export the file again."
            )
    return tensors, record


def verify(path: str | os.PathLike) -> bool:
    """Read a whole checkpoint, of any size, against its digest. False for one without; ValueError if it was changed."""
    _, _, digest = _read(path, None)
    if digest is None:
        return False
    _check_content(load_tensors(path), digest, path)
    return True


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of any safetensors file as stored, on the CPU, whether or not it carries our record."""
    header.read(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (
        SafetensorError,
        KeyError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:  # also a dtype that torch lacks
        raise ValueError(f"{path} is a damaged safetensors file: download or export it again.") from error


def load_parts(path: str | os.PathLike) -> dict[str, Tensor]:
    """`load_tensors` of a file or, where it is one of several (`...-00001-of-00003.safetensors`), of all of them."""
    return {key: tensor for file in whole_parts(path) for key, tensor in load_tensors(file).items()}


def whole_parts(path: str | os.PathLike) -> list[Path]:
    """`parts`, with a ValueError where one of several is not there."""
    files = parts(path)
    lacking = [file.name for file in files if not file.is_file()]
    if lacking and len(files) > 1:
        raise ValueError(
            f"{Path(path).name} is one of {len(files)} parts and {lacking[0]} is not beside it: put all of them there."
        )
    return files


def parts(path: str | os.PathLike) -> list[Path]:
    """The files that hold what this one does a part of, by its name, in their order; itself alone if it is whole."""
    path = Path(path)
    part = re.fullmatch(r"(.*-)(\d{1,5})-of-(\d{1,5})\.safetensors", path.name)
    if part is None:
        return [path]
    name, digits, count = part[1], len(part[2]), part[3]
    files = [path.with_name(f"{name}{i:0{digits}}-of-{count}.safetensors") for i in range(1, int(count) + 1)]
    return files if path in files else [path]


def _layout(record: dict[str, Any], table: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """The hash of the record without the digest and of every tensor's name, dtype and shape."""
    text = json.dumps([record, sorted((name, dtype, *shape) for name, (dtype, shape) in table.items())], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _content(stored: dict[str, Tensor]) -> str:
    """The hash of the tensors' bytes, in the order of their names."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(stored):
        hashed.update(stored[name].reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def _check_content(stored: dict[str, Tensor], digest: Digest, path: str | os.PathLike) -> None:
    if _content(stored) != digest.content:
        raise ValueError(
            f"{path} is not as it was saved (numbers in its tensors were changed): download or export it again."
        )
