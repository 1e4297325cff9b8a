"""What a device computes fast, and that nothing but kernels/precision.py decides it."""
from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from semantic_diffusion_adapter.kernels import precision

ROOT = Path(precision.__file__).resolve().parents[1]
CPU = torch.device("cpu")
# GPUs by the maker's names, with their compute capabilities (developer.nvidia.com/cuda-gpus).
CARDS = {(9, 0): "H100", (8, 9): "4090", (8, 6): "3090", (8, 0): "A100", (7, 5): "T4", (7, 0): "V100", (6, 1): "1080", (6, 0): "P100",
         (5, 2): "980"}
FAST = {"H100": torch.bfloat16, "4090": torch.bfloat16, "3090": torch.bfloat16, "A100": torch.bfloat16, "T4": torch.float16,
        "V100": torch.float16, "1080": torch.float32, "P100": torch.float16, "980": torch.float32}


@pytest.fixture
def a_cpu(monkeypatch):
    """a_cpu(oneDNN's word, the instruction, architecture) is the CPU from now on."""
    def be(emulates: bool, instruction: bool, machine: str = "x86_64") -> torch.dtype:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: emulates, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instruction, raising=False)
        monkeypatch.setattr(precision.platform, "machine", lambda: machine)
        return precision.fast_dtype("cpu")
    return be


def test_a_cpu_computes_bfloat16_only_by_its_own_instructions(a_cpu):
    assert a_cpu(True, True) is torch.bfloat16
    assert a_cpu(True, False) is torch.float32, "AVX-512 without them: oneDNN emulates"
    assert a_cpu(False, False) is torch.float32, "AVX2"
    assert a_cpu(True, False, "AMD64") is torch.float32, "as Windows names it"
    assert a_cpu(True, False, "aarch64") is torch.bfloat16 and a_cpu(False, False, "arm64") is torch.float32


def test_a_pytorch_that_cannot_tell_gets_float32(a_cpu, monkeypatch):
    a_cpu(True, True)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert precision.fast_dtype("cpu") is torch.float32

    class Without:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Without())
    assert precision.fast_dtype("cpu") is torch.float32


@pytest.mark.parametrize("capability", CARDS, ids=CARDS.values())
def test_nvidia_computes_bfloat16_from_ampere_on(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fast = FAST[CARDS[capability]]
    assert precision.fast_dtype("cuda:1") is fast
    half = fast is torch.bfloat16
    assert precision.resolve("auto", "cuda") == ("bf16" if half else "fp32"), "never float16"
    assert precision.frozen_dtype("cuda") is (torch.bfloat16 if half else torch.float32)


@pytest.mark.parametrize("architecture, fast", [("gfx942:sramecc+:xnack-", torch.bfloat16), ("gfx1100", torch.bfloat16),
                                                ("gfx1201", torch.bfloat16), ("gfx1030", torch.float16), ("gfx906", torch.float16)])
def test_amd_computes_bfloat16_from_cdna2_and_rdna3_on(monkeypatch, architecture, fast):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture))
    assert precision.fast_dtype("cuda") is fast


def test_of_other_devices_only_what_they_say_themselves(monkeypatch):
    assert precision.fast_dtype("mps") is torch.float16 and precision.resolve("auto", "mps") == "fp32"
    for answer, fast in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda answer=answer: answer, raising=False)
        assert precision.fast_dtype("xpu") is fast
    assert precision.fast_dtype("meta") is torch.float32


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_follows_the_answer(monkeypatch, fast):
    monkeypatch.setattr(precision, "fast_dtype", lambda device: fast)
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for asked, expected in (("auto", fast is torch.bfloat16), ("bf16", True), ("fp32", False)):
        with precision.autocast(CPU, asked):
            assert layer(x).dtype is (torch.bfloat16 if expected else torch.float32), asked
    assert precision.frozen_dtype(CPU) is torch.float32, "what is seen on a CPU is kept for other machines"


def test_nobody_else_decides():
    """No autocast to a fixed dtype outside the one file, and no dtype by the kind of device."""
    fixed = re.compile(r"autocast\([^)]*torch\.b?float16|b?float16 if [^\n]*(\.type|cuda)|is_bf16_supported|mkldnn")
    for room in ("kernels", "nodes", "training", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            if path != Path(precision.__file__).resolve():
                found = fixed.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path}: {found[0]}"
