"""Small helpers about files, and which code wrote them."""
from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import checkpoint

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder as diffusers and transformers write it: one safetensors file, or several parts."""
    files = sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name))
    if not files:
        raise ValueError(f"{folder} holds no safetensors file; download the model's safetensors weights into it.")
    return checkpoint.load_parts(files[0])  # variants lie beside it, named longer


def code_version() -> str:
    """The git commit of this code, or its release where it is no clone."""
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
