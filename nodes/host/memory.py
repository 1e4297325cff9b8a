"""Networks of ours under ComfyUI's memory management: loaded when used, moved away when others need the room."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...kernels.precision import fast_dtype

# Below this many weights half precision saves nothing worth its rounding.
SMALL = 50_000_000


@dataclass(frozen=True, eq=False)
class Network:
    """A module and the patcher that holds it. `name` is the file it came from, `record` what the file says."""

    module: nn.Module
    patcher: Any
    name: str
    record: dict[str, Any]

    def ready(self) -> tuple[torch.device, torch.dtype]:
        """Bring the whole network to the compute device.

        Returns the device and the dtype that it wants its inputs in.
        """
        # Plain torch layers cannot stream their weights, so it is all or nothing.
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher.load_device, next(self.module.parameters()).dtype


def hold(module: nn.Module, path: str, record: dict[str, Any]) -> Network:
    """Put a module under core's ModelPatcher, in the dtype that suits the device and the size of the network."""
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    module = module.to(device=offload, dtype=_dtype(module, device)).eval().requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher(module, load_device=device, offload_device=offload)
    return Network(module, patcher, Path(path).name, record)


def to_intermediate(tensor: Tensor) -> Tensor:
    """The tensor in float32, on the device where core keeps what nodes hand on."""
    return tensor.to(comfy.model_management.intermediate_device(), torch.float32)


def _dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """float32 for a small network.

    For others what the device computes fast, if core's flags and its list of cards agree.
    """
    weights, fast = sum(parameter.numel() for parameter in module.parameters()), fast_dtype(device)
    if weights < SMALL or fast is torch.float32:
        return torch.float32
    core = comfy.model_management
    if core.is_device_cpu(device):  # of which core always says no
        return torch.float32 if core.FORCE_FP32 else fast
    if fast is torch.bfloat16 and core.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if core.should_use_fp16(device) else torch.float32
