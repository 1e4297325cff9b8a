"""How a checkpoint stores its tensors: as they are, in another floating dtype, or in int8 with a scale per row."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import header, schema

SCALE_SUFFIX = "::scale"
_FLOATS = {"F64", "F32", "F16", "BF16"}


def finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; whole numbers have neither."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def pack(name: str, tensor: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A tensor as it is stored under `dtype` (see `checkpoint.save`), with its scale where it has one."""
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
    if not finite(cast):
        raise ValueError(f"The tensor {name!r} does not fit {dtype}: store it in bfloat16 or float32.")
    return cast


def unpack(stored: dict[str, Tensor], name: str) -> Tensor:
    """A stored tensor, float32 where it has a scale."""
    scale = stored.get(name + SCALE_SUFFIX)
    if scale is None:
        return stored[name]
    shape = (-1,) + (1,) * (stored[name].ndim - 1)
    return stored[name].float() * scale.reshape(shape)


def check_storage(table: dict[str, tuple[str, tuple[int, ...]]], mixed: bool, path: str | os.PathLike) -> None:
    """ValueError unless the dtypes are those that a checkpoint stores: int8 with its scales, and floats.

    mixed: floats of several dtypes are allowed. Without a digest they are not: nothing would tell a retyped tensor,
        which reads as other numbers.
    """
    floats: dict[str, str] = {}
    for name, (dtype, shape) in table.items():
        scale = table.get(name + SCALE_SUFFIX)
        if name.endswith(SCALE_SUFFIX):
            if name.removesuffix(SCALE_SUFFIX) not in table:
                raise ValueError(f"{path} has {schema.short(name)} without the tensor that it scales: export it again.")
        elif dtype == "I8" or scale is not None:
            if dtype != "I8" or len(shape) < 2 or scale != ("F32", shape[:1]):
                found = "no scale" if scale is None else f"a scale of {scale[0]} {list(scale[1])}"
                raise ValueError(
                    f"The tensor {schema.short(name)} in {path} is {dtype} {list(shape)} with {found}, where eight bits take "
                    "one F32 scale per row: export it again."
                )
        elif dtype not in header.DTYPES.values():
            raise ValueError(
                f"The tensor {schema.short(name)} in {path} is {dtype}, which no file of this pack stores: export it again."
            )
        elif dtype in _FLOATS:
            floats.setdefault(dtype, name)
    if not mixed and len(floats) > 1:
        (first, name), (second, other) = list(floats.items())[:2]
        raise ValueError(
            f"{path} stores {schema.short(name)} as {first} and {schema.short(other)} as {second}, and nothing in it says why: "
            "export it again."
        )
