"""Checkpoint files: safetensors with one JSON record that says what the file is.

The record is the value of the safetensors metadata key ``sda``. It always has ``format_version``, ``kind`` and
``config``; other fields (hierarchy, widths, towers, base_sha256, step, licence, ...) are kept as given. Every reader checks
the record before it touches a tensor, and every refusal is one sentence that names the file and what to do about it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
RECORD_KEY = "sda"
KINDS = ("adapter", "edit_decoder", "vision_tower", "flux", "vae", "text_encoder", "embedding")
SCALE_SUFFIX = "::scale"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


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
    Raises ValueError for an unknown kind, a reserved field, a tensor that is not finite or a file that cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"Cannot save a checkpoint of kind {kind!r}: use one of {', '.join(KINDS)}.")
    reserved = {"format_version", "kind", "config"} & fields.keys()
    if reserved:
        raise ValueError(f"The checkpoint field {sorted(reserved)[0]!r} is reserved: choose another name.")
    record = {"format_version": FORMAT_VERSION, "kind": kind, "config": config, **fields}
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state_dict.items():
        if name.endswith(SCALE_SUFFIX):
            raise ValueError(f"The tensor name {name!r} ends with the reserved suffix {SCALE_SUFFIX!r}: rename it.")
        tensor = tensor.detach().cpu()
        if not _finite(tensor):
            raise ValueError(f"The tensor {name!r} has NaN or infinite values: the checkpoint {path} was not written.")
        for key, value in _pack(name, tensor, dtype).items():
            value = value.contiguous()
            # safetensors refuses tensors that share memory (tied weights): store such a one twice.
            memory = value.untyped_storage().data_ptr()
            stored[key] = value.clone() if memory in seen else value
            seen.add(memory)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, metadata={**(metadata or {}), RECORD_KEY: json.dumps(record, sort_keys=True)})
        # Some releases of safetensors make files that only their owner can read; a server often runs as someone else.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} was not written ({reason}): make room on the disk or choose another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_header(path: str | os.PathLike, kind: str | None = None) -> dict[str, Any]:
    """The record of a checkpoint (of this kind), read without loading a tensor. ValueError in one sentence if it will not do."""
    metadata, _ = _safetensors_header(path)
    text = metadata.get(RECORD_KEY)
    if text is None:
        raise ValueError(f"{path} has no Semantic Diffusion Adapter record: choose a file that this pack made.")
    try:
        record = json.loads(text)
        version, found, config = record["format_version"], record["kind"], record["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The record in {path} is damaged: download or export the file again.") from error
    if not isinstance(version, int) or not isinstance(found, str) or not isinstance(config, dict):
        raise ValueError(f"The record in {path} is damaged: download or export the file again.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version} and this pack reads up to {FORMAT_VERSION}: update the pack."
        )
    if kind not in (None, found):
        raise ValueError(f"{path} holds a checkpoint of kind {found!r} where {kind!r} is needed: choose another file.")
    return record


def has_record(path: str | os.PathLike) -> bool:
    """Whether a safetensors file carries our record; public weights (vision towers) do not."""
    return RECORD_KEY in _safetensors_header(path)[0]


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict on the CPU, record) of a checkpoint of this kind; int8 tensors come back as float32.

    Raises ValueError in one sentence: no safetensors file, truncated, no record, newer version, another kind, not finite.
    """
    record = read_header(path, kind)
    stored = load_tensors(path)
    tensors = {
        name: _unpack(stored, name) for name in stored if not name.endswith(SCALE_SUFFIX)
    }
    for name, tensor in tensors.items():
        if not _finite(tensor):
            raise ValueError(f"The tensor {name!r} in {path} has NaN or infinite values: download or export the file again.")
    return tensors, record


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of any safetensors file as stored, on the CPU, whether or not it carries our record."""
    _safetensors_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file: download or export it again.") from error


def load_parts(path: str | os.PathLike) -> dict[str, Tensor]:
    """`load_tensors` of a file or, where it is one of several (`...-00001-of-00003.safetensors`), of all of them."""
    files = parts(path)
    lacking = [file.name for file in files if not file.is_file()]
    if lacking and len(files) > 1:
        raise ValueError(f"{Path(path).name} is one of {len(files)} parts and {lacking[0]} is not beside it: put all of them there.")
    return {key: tensor for file in files for key, tensor in load_tensors(file).items()}


def parts(path: str | os.PathLike) -> list[Path]:
    """The files that hold what this one does a part of, by its name, in their order; itself alone if it is whole."""
    path = Path(path)
    part = re.fullmatch(r"(.*-)(\d{1,5})-of-(\d{1,5})\.safetensors", path.name)
    if part is None:
        return [path]
    name, digits, count = part[1], len(part[2]), part[3]
    files = [path.with_name(f"{name}{i:0{digits}}-of-{count}.safetensors") for i in range(1, int(count) + 1)]
    return files if path in files else [path]


def fill(module: nn.Module, state_dict: dict[str, Tensor], what: str | os.PathLike) -> None:
    """Load every tensor of `module` from `state_dict`, exactly; `what` (a path) names the source in the errors."""
    own = module.state_dict()
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    if missing or unexpected:
        which = f"lacks {missing[0]!r}" if missing else f"has the unknown tensor {unexpected[0]!r}"
        count = len(missing) + len(unexpected)
        raise ValueError(
            f"{what} {which} ({count} tensors do not match in all): its record and its tensors belong to different "
            "models, export the file again."
        )
    for name, tensor in own.items():
        if state_dict[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(state_dict[name].shape)} in {what} where its record implies "
                f"{tuple(tensor.shape)}: export the file again."
            )
    module.load_state_dict(state_dict)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _pack(name: str, tensor: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype is None or not tensor.is_floating_point():
        return {name: tensor}
    if dtype != torch.int8:
        return {name: _cast(name, tensor, dtype)}
    if tensor.ndim < 2 or tensor.numel() == 0:
        return {name: _cast(name, tensor, torch.float16)}
    rows = tensor.float().flatten(1)
    scale = rows.abs().amax(dim=1) / 127
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    packed = (rows / divisor[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {name: packed.reshape(tensor.shape), name + SCALE_SUFFIX: scale}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not _finite(cast):
        raise ValueError(f"The tensor {name!r} does not fit {dtype}: store it in bfloat16 or float32.")
    return cast


def _unpack(stored: dict[str, Tensor], name: str) -> Tensor:
    scale = stored.get(name + SCALE_SUFFIX)
    if scale is None:
        return stored[name]
    shape = (-1,) + (1,) * (stored[name].ndim - 1)
    return stored[name].float() * scale.reshape(shape)


def _safetensors_header(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Any]]:
    """(metadata, tensor table) of a safetensors file, checked against the size of the file."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            text = file.read(length) if 0 < length <= _MAX_HEADER_BYTES else b""
    except FileNotFoundError as error:
        raise ValueError(f"There is no checkpoint at {path}: put the file there or choose another.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error
    if not text.startswith(b"{"):
        raise ValueError(f"{path} is not a safetensors file: only safetensors checkpoints are loaded.")
    if 8 + length > size:
        raise ValueError(f"{path} is cut short: download or export it again.")
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: only safetensors checkpoints are loaded.") from error
    if end > size:
        raise ValueError(f"{path} is cut short: download or export it again.")
    return metadata, header
