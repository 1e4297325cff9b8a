"""What a device computes fast: the one place that asks PyTorch, so that every other one asks here.

bfloat16 is no property of a model but of a machine. On a CPU without its instructions autocast to bfloat16 is up to 90
times slower than float32, and GPUs before Ampere have none either.
"""
from __future__ import annotations

import platform

import torch


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The narrowest of bfloat16, float16 and float32 that a device computes in no slower than in any wider one.

    It is float16 on GPUs without bfloat16, and float32 on every device that is not known here.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    if device.type == "cuda":
        return _of_hip(device) if torch.version.hip else _of_cuda(device)
    if device.type == "mps":
        return torch.float16  # every Apple GPU; bfloat16 only from M2 and macOS 14
    backend = getattr(torch, device.type, None)  # xpu and those that plug in under a name of their own
    supported = getattr(backend, "is_bf16_supported", None)
    return torch.bfloat16 if supported is not None and supported() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether the matrix products of this CPU are faster in bfloat16."""
    try:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False
    if supported and platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN says yes to any AVX-512. It emulates a missing instruction, 2 to 3 times slower than float32.
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return bool(supported)


def _of_cuda(device: torch.device) -> torch.dtype:
    """By compute capability: bfloat16 from Ampere (8.0) on, fast float16 in Volta, Turing and the P100 (6.0).

    Source: the table of arithmetic throughput in NVIDIA's CUDA C++ Programming Guide.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) or capability == (6, 0) else torch.float32


def _of_hip(device: torch.device) -> torch.dtype:
    """By architecture: bfloat16 from CDNA 2 (gfx90a) and RDNA 3 (gfx11) on."""
    architecture = torch.cuda.get_device_properties(device).gcnArchName
    known = architecture.startswith(("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
    return torch.bfloat16 if known else torch.float16


def resolve(precision: str, device: torch.device | str) -> str:
    """"auto" as what computes fast and has float32's range: "bf16" or "fp32". Any other word stays as it is.

    Never float16: gradients vanish in it without a loss scaler, and T5 and autoencoders overflow.
    """
    if precision != "auto":
        return precision
    return "bf16" if fast_dtype(device) is torch.bfloat16 else "fp32"


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """The context of a precision ("auto", "bf16" or "fp32") on a device. For "fp32" it turns autocast off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve(precision, device) == "bf16")


def frozen_dtype(device: torch.device | str, precision: str = "auto") -> torch.dtype:
    """The dtype of frozen encoders beside a computation in that precision.

    It is bfloat16 for bf16 on a GPU and float32 elsewhere.

    A CPU with bfloat16 takes float32 too: what encoders give there is kept in caches that other machines read.
    """
    half = torch.device(device).type != "cpu" and resolve(precision, device) == "bf16"
    return torch.bfloat16 if half else torch.float32
