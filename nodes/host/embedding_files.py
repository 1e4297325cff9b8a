"""Embedding files in core's input and output folders: their names, thumbnails, and the workflow that made them."""

from __future__ import annotations

import hashlib
import json
import os
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import torch
import torch.nn.functional as F
from comfy.cli_args import args
from PIL import Image
from torch import Tensor

from ...kernels import embedding_file
from ...kernels.embedding import SemanticEmbedding
from ...kernels.picture import over_white
from .names import fault, leads_out, shown
from .saying import say
from .walk import Walk

OUTPUT = " [output]"  # core's mark for a name in the output folder
THUMBNAIL = 256


def _is_ours(path: str) -> bool:
    try:
        embedding_file.check(path)
    except ValueError:
        return False
    return True


_walk = Walk(embedding_file.SUFFIX, _is_ours)


def files() -> list[str]:
    """The embedding files of the input folder, then of the output folder with core's mark; subfolders included."""
    given, made = map(_walk.below, (folder_paths.get_input_directory(), folder_paths.get_output_directory()))
    return [name for name in (*given, *(name + OUTPUT for name in made)) if fault(name) is None]


def find(file: str) -> Path:
    """The file that a name of `files` means. ValueError if it leads elsewhere or is not there."""
    name, folder = folder_paths.annotated_filepath(file)
    if not name.strip():
        raise ValueError("No embedding is chosen: upload a file with the button below, or save one and refresh the page (R).")
    folders = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    folder = folder or folders[0]
    if folder not in folders or leads_out(name):
        raise ValueError(f"{shown(file)} is outside ComfyUI's input and output folders: copy the file into one of them.")
    path = Path(folder, name)
    if not os.path.isfile(path):  # which, unlike Path's own, no name can make raise
        raise ValueError(f"There is no embedding {shown(name)} in {folder}: put the file there and refresh the page (R).")
    return path


def fingerprint(file: str | None) -> str:
    """The hash of a file. Empty for a missing file or a linked name, which core does not know yet."""
    try:
        return hashlib.sha256(find(file).read_bytes()).hexdigest() if file else ""
    except ValueError:
        return ""


def load(file: str) -> tuple[SemanticEmbedding, Tensor]:
    """(embedding, thumbnail as IMAGE [1, H, W, 3]; grey if the file has none)."""
    embedding, jpeg = embedding_file.load(find(file))
    return embedding.to(comfy.model_management.intermediate_device()), _picture(jpeg)


def save(embedding: SemanticEmbedding, prefix: str, image: Tensor | None, hidden: Any) -> str:
    """Write an embedding by core's naming rules, with the workflow that core knows of; "name (size in KB)" of the file.

    image: IMAGE whose first picture becomes the thumbnail.
    hidden: the node's PROMPT and EXTRA_PNGINFO, or None.
    """
    check_prefix(prefix)
    prefix = PureWindowsPath(prefix).as_posix()  # one name for one graph, whatever system runs it
    height, width = (0, 0) if image is None else image.shape[1:3]
    root = folder_paths.get_output_directory()
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    except OSError as error:
        raise ValueError(f"The folder of {shown(prefix)} cannot be used ({error.strerror}): choose another name.") from error
    path = Path(folder, f"{name}_{counter:05}_{embedding_file.SUFFIX}")
    embedding_file.save(path, embedding, None if image is None else _jpeg(image), _workflow(hidden))
    text = f"{Path(subfolder, path.name).as_posix()} ({path.stat().st_size / 1024:.0f} KB)"
    say(text)
    return text


def check_prefix(prefix: str) -> None:
    """ValueError for a name of `save` that is empty, leads out of the output folder or cannot be stored everywhere."""
    if not prefix.strip():
        raise ValueError("The file name is empty: write a name such as embeddings/mine.")
    if leads_out(prefix) or not PureWindowsPath(prefix).parts:
        raise ValueError(
            f"The file name {shown(prefix)} leads out of the output folder: write a name such as embeddings/mine."
        )
    if reason := fault(prefix):
        raise ValueError(f"The file name {shown(prefix)} {reason}.")


def _jpeg(image: Tensor) -> bytes:
    pixels = over_white(image[:1].float()).movedim(-1, 1)
    scale = min(1.0, THUMBNAIL / max(pixels.shape[-2:]))
    size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, size=size, mode="area")[0].movedim(0, -1)
    made = BytesIO()
    Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(made, "JPEG", quality=85)
    return made.getvalue()


def _picture(jpeg: bytes | None) -> Tensor:
    try:
        with Image.open(BytesIO(jpeg or b""), formats=["JPEG"]) as file:
            if max(file.size) <= THUMBNAIL:
                return torch.from_numpy(np.asarray(file.convert("RGB"), dtype=np.float32) / 255)[None]
    except (OSError, Image.DecompressionBombError):
        pass  # no thumbnail, or a damaged one: the embedding itself is fine
    return torch.full((1, THUMBNAIL, THUMBNAIL, 3), 0.5)


def _workflow(hidden: Any) -> dict[str, str]:
    """What core writes into its PNG files; the page opens the workflow when the file is dropped on it."""
    if hidden is None or args.disable_metadata:
        return {}
    known = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in known.items() if value is not None}
