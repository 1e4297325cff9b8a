"""Small helpers about files, and which code wrote them."""
from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..kernels import checkpoint, header
from ..kernels.storage import SCALE_SUFFIX

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
STORED = {name: dtype for dtype, name in header.DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "I32": torch.int32}


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_tensors(folder: Path,
                   read: Callable[[Path], dict[str, Tensor]] = checkpoint.load_tensors) -> dict[str, Tensor]:
    """The tensors of a model folder as diffusers and transformers write it: one safetensors file, or several parts."""
    files = sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name))
    if not files:
        raise ValueError(f"{folder} holds no safetensors file; download the model's safetensors weights into it.")
    # Variants lie beside the first file and have longer names.
    return {name: tensor for part in checkpoint.whole_parts(files[0]) for name, tensor in read(part).items()}


def outline(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device, named as `checkpoint.load_tensors` names them. It reads
    only the header and the few bytes in which ComfyUI says how a layer is quantised. ValueError for a file or a dtype
    that PyTorch does not have."""
    entries, found = header.read(path).tensors, {}
    for name, entry in entries.items():
        if entry.dtype not in STORED:
            raise ValueError(f"{path} has {name} in {entry.dtype}, which is not read here; give the bf16, fp16 or "
                             "fp8 file.")
        found[name] = torch.empty(entry.shape, dtype=STORED[entry.dtype], device="meta")
    if words := [name for name in entries if name.endswith(".comfy_quant")]:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in words}
    return found


def recorded(path: Path, kind: str, read: Callable[[Path], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict]:
    """(tensors, record) of one of our own files: loaded, or their outline where `read` is that."""
    if read is not outline:
        return checkpoint.load(path, kind)
    tensors = {name: tensor.float() for name, tensor in outline(path).items() if not name.endswith(SCALE_SUFFIX)}
    return tensors, checkpoint.read_header(path, kind)


def code_version() -> str:
    """The git commit of this code, or its release where it is not a clone."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        try:
            return subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    try:
        return version("semantic-diffusion-adapter")
    except PackageNotFoundError:
        return "unknown"
