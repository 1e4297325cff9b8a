"""Rows of the index to tensors of their bucket."""
from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .index import EDITS, CorruptSample, Index
from .pictures import BadPicture, open_picture

__all__ = ["CorruptSample", "decode", "decode_edit", "fit"]


def fit(image: Image.Image, bucket: tuple[int, int]) -> Tensor:
    """The picture resized to cover the bucket (height, width) and cropped about its centre: [3, H, W] float32 in [0, 1]."""
    height, width = bucket
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def decode(index: Index, row: int, bucket: tuple[int, int], member: str = "") -> Tensor:
    """The picture of a row in its bucket (height, width): [3, H, W] float32 in [0, 1]. Raises CorruptSample."""
    try:
        # Twice the bucket leaves the fine resampling to Lanczos.
        return fit(open_picture(index.read_member(row, member), 2 * max(bucket))[0], bucket)
    except BadPicture as error:
        raise CorruptSample(index, row, str(error)) from None


def decode_edit(index: Index, row: int, bucket: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
    """(source, target, instruction) of a row of an index of edits; pictures as `decode` gives them."""
    if index.kind != EDITS:
        raise ValueError(f"{index.url} holds pictures, not edits; prepare the edits with `sda prepare-edits`.")
    return decode(index, row, bucket), decode(index, row, bucket, "target"), index[row]["caption"]
