"""Where a machine computes float32 fast, no layer of a training, of a validation or of the evaluation computes in anything else."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import precision  # noqa: E402
from semantic_diffusion_adapter.training.config import RunConfig, from_toml  # noqa: E402
from semantic_diffusion_adapter.training.miniature import adapter, base, editor  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation.system import Miniature  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import render, scene  # noqa: E402
from torch.nn.modules.module import register_module_forward_hook  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def computed():
    """The dtypes beside float32 that layers have put out, in whichever thread; a linear layer or a convolution obeys autocast."""
    seen: set[torch.dtype] = set()

    def note(out) -> None:
        if isinstance(out, torch.Tensor) and out.dtype is not torch.float32:
            seen.add(out.dtype)

    hook = register_module_forward_hook(lambda module, args, out: note(out))
    yield seen
    hook.remove()


SLOW = pytest.mark.skipif(precision.fast_dtype(CPU) is torch.float32, reason="this CPU computes bfloat16 tens of times slower")


@pytest.fixture(params=["fp32", pytest.param("bf16", marks=SLOW)])
def fast(request, monkeypatch) -> set[torch.dtype]:
    """The machine computes this fast; the dtypes beside float32 that are to be seen then."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]
    monkeypatch.setattr(precision, "fast_dtype", lambda device: dtype)
    return {dtype} - {torch.float32}


def configuration(name: str, assets: Path, out: Path):
    """(module, configuration) of one step of a stage and its validations at toy width."""
    run = RunConfig(out / "run", max_steps=1, batch=2, device="cpu")
    flux, text = assets / "diffusion_models/miniature_flux.safetensors", assets / "text_encoders/miniature_t5.safetensors"
    vae, cache = assets / "vae/miniature_vae.safetensors", out / "cache"
    towers = (assets / "clip_vision/miniature_clip.safetensors", assets / "clip_vision/miniature_dinov2.safetensors")
    made = [out / "one.safetensors", out / "two.safetensors"]
    if name == "base":
        return base, base.Config(run, vae, text, *made, cache, scenes=32)
    if name == "adapter":
        return adapter, adapter.Config(run, flux, text, vae, towers, *made, cache, width=32, heads=2, layers=1, scenes=32)
    known = assets / "semantic_adapters/miniature_tree128.safetensors"
    return editor, editor.Config(run, text, known, towers, made[0], cache, scenes=32, width=32, heads=2, layers=1)


@pytest.mark.parametrize("name", ["base", "adapter", "editor"])
def test_a_training_computes_in_what_is_fast(name, toy_assets, tmp_path, fast, computed, monkeypatch):
    for key, value in dict(hidden_size=48, num_heads=2, axes_dim=[8, 8, 8], depth=1, depth_single_blocks=2, context_in_dim=48,
                           vec_in_dim=48).items():
        monkeypatch.setitem(base.FLUX, key, value)
    module, config = configuration(name, toy_assets, tmp_path)
    monkeypatch.setattr(module, "VALIDATED", 2)
    assert module.run(config)
    assert computed == fast
    recorded = from_toml(type(config), tmp_path / "run" / "config.toml").run.precision
    assert recorded == ("bf16" if torch.bfloat16 in fast else "fp32")


def test_the_evaluation_computes_in_what_is_fast(toy_assets, fast, computed):
    system = Miniature(toy_assets, CPU, adapters=("tree128",))
    pictures, noise = render(scene("test", 0))[None], system.noise("test", [0], 0)
    for make in (lambda: system.embed(pictures, "tree64"), lambda: system.latents(pictures), lambda: system.decode(noise),
                 lambda: system.paint(system.embed(pictures, "tree64"), "tree64", noise),
                 lambda: system.paint_text(["a red circle"], noise)):
        computed.clear()
        make()
        assert computed == fast
