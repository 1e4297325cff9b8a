"""In what a network of ours is held under core's memory management: what the device computes fast, where core agrees."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.model_management", reason="there is no ComfyUI here: COMFYUI_PATH names one")

import comfy.model_management as core  # noqa: E402
from semantic_diffusion_adapter.nodes.host import memory  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def held(monkeypatch):
    """held(device, what it computes fast, what core says of bfloat16 and of float16) -> dtype of a large network."""
    large = torch.nn.Linear(memory.SMALL, 1, bias=False, device="meta")

    def ask(device: torch.device, fast: torch.dtype, bf16: bool = False, fp16: bool = False) -> torch.dtype:
        monkeypatch.setattr(memory, "fast_dtype", lambda asked: fast)
        monkeypatch.setattr(core, "should_use_bf16", lambda asked: bf16)
        monkeypatch.setattr(core, "should_use_fp16", lambda asked: fp16)
        return memory._dtype(large, device)

    return ask


def test_a_cpu_holds_it_in_what_it_computes_fast(held, monkeypatch):
    assert held(CPU, BF16) is BF16, "whatever core says of CPUs"
    assert held(CPU, FP32) is FP32
    monkeypatch.setattr(core, "FORCE_FP32", True)
    assert held(CPU, BF16) is FP32


def test_a_gpu_needs_core_to_agree(held):
    assert held(GPU, BF16, bf16=True, fp16=True) is BF16
    assert held(GPU, FP16, bf16=True, fp16=True) is FP16, "before Ampere"
    assert held(GPU, BF16, fp16=True) is FP16, "an old system of a Mac, a flag"
    assert held(GPU, FP16) is FP32, "a card that core knows float16 to break on"
    assert held(GPU, FP32, bf16=True, fp16=True) is FP32


def test_a_small_network_stays_in_float32(held):
    held(CPU, BF16)
    assert memory._dtype(torch.nn.Linear(4, 4), CPU) is FP32
