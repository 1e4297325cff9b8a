"""From rows of the index to tensors of their bucket."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .index import EDITS, CorruptSample, Index
from .pictures import BadPicture, open_picture

__all__ = ["CorruptSample", "decode", "decode_edit", "fit", "send"]


def fit(image: Image.Image, bucket: tuple[int, int]) -> Tensor:
    """The RGB picture, cropped about its centre to the bucket's aspect and resized to it (height, width): [3, H, W]
    uint8. The filter is bicubic with antialiasing on bytes, which takes a quarter of the time of Pillow's Lanczos."""
    height, width = bucket
    scale = min(image.height / height, image.width / width)
    h, w = min(image.height, round(height * scale)), min(image.width, round(width * scale))
    top, left = (image.height - h) // 2, (image.width - w) // 2
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, top:top + h, left:left + w]
    if (h, w) != (height, width):
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    return pixels.contiguous()


def send(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows of one shape as [B, ...] on a device. They go to a GPU from pinned memory, so that the host need not wait.
    Pictures travel as bytes and become float32 in [0, 1] there. Everything else stays as it is."""
    batch = torch.stack(list(rows),
                        out=torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype,
                                        pin_memory=device.type == "cuda"))
    batch = batch.to(device, non_blocking=True)
    return batch.float().div_(255) if batch.dtype == torch.uint8 else batch


def decode(index: Index, row: int, bucket: tuple[int, int], member: str = "") -> Tensor:
    """The picture of a row in its bucket (height, width): [3, H, W] uint8. Raises CorruptSample."""
    try:
        # At twice the bucket's size, the filter still does the fine resampling.
        return fit(open_picture(index.read_member(row, member), (2 * bucket[0], 2 * bucket[1]))[0], bucket)
    except BadPicture as error:
        raise CorruptSample(index, row, str(error)) from None


def decode_edit(index: Index, row: int, bucket: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
    """(source, target, instruction) of a row of an index of edits. The pictures are as `decode` gives them."""
    if index.kind != EDITS:
        raise ValueError(f"{index.url} holds pictures, not edits; prepare the edits with `sda prepare-edits`.")
    return decode(index, row, bucket), decode(index, row, bucket, "target"), index[row]["caption"]
