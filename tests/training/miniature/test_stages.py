"""Every stage's step is that of its samples: a batch cut in two, as by two processes, has the same loss."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.config import RunConfig  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step, World  # noqa: E402
from semantic_diffusion_adapter.training.engine.loop import check  # noqa: E402
from semantic_diffusion_adapter.training.miniature import adapter, base, clip, dinov2, editor, reader, vae  # noqa: E402

CPU = torch.device("cpu")


def make(name: str, assets: Path, tmp: Path, patch: pytest.MonkeyPatch):
    run = RunConfig(tmp, max_steps=10, batch=4, precision="fp32")
    flux, text = assets / "diffusion_models/miniature_flux.safetensors", assets / "text_encoders/miniature_t5.safetensors"
    vae_file, out, cache = assets / "vae/miniature_vae.safetensors", tmp / "out.safetensors", assets.parent / "cache"
    towers = (assets / "clip_vision/miniature_clip.safetensors", assets / "clip_vision/miniature_dinov2.safetensors")
    if name == "vae":
        patch.setitem(vae.ARCHITECTURE, "block_out_channels", [32, 32, 32, 32])
        return vae.VaeStage(vae.Config(run, out), CPU)
    if name == "text":
        return reader.ReaderStage(reader.Config(run, out, cache, scenes=64), CPU)
    if name == "base":
        for key, value in dict(hidden_size=48, num_heads=2, axes_dim=[8, 8, 8], depth=1, depth_single_blocks=2,
                               context_in_dim=48, vec_in_dim=48).items():
            patch.setitem(base.FLUX, key, value)
        return base.BaseStage(base.Config(run, vae_file, text, out, out, cache, scenes=32), CPU)
    if name == "dinov2":
        return dinov2.Dinov2Stage(dinov2.Config(run, out, cache, scenes=48, crowds=16), CPU)
    if name == "adapter":
        return adapter.AdapterStage(adapter.Config(
            run, flux, text, vae_file, towers, out, out, cache, width=32, heads=2, layers=1, scenes=24, crowds=8), CPU)
    return editor.EditorStage(editor.Config(run, text, assets / "semantic_adapters/miniature_tree128.safetensors", towers, out, cache,
                                            scenes=64, width=32, heads=2, layers=1), CPU)


@pytest.mark.parametrize("name", ["vae", "text", "base", "dinov2", "adapter", "editor"])
def test_a_batch_in_two_halves_has_the_same_loss(name, toy_assets, tmp_path, monkeypatch):
    stage = make(name, toy_assets, tmp_path, monkeypatch)

    @torch.no_grad()
    def parts(positions: range, number: int = 7) -> torch.Tensor:
        loss, found = stage.loss(Step(number, 10, 0, stage.name, CPU, positions, 4))
        return torch.stack([loss, *found.values()])

    whole, halves = parts(range(4)), (parts(range(2)), parts(range(2, 4)))
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-4, atol=1e-6)
    assert not torch.equal(*halves) and not torch.equal(parts(range(4), 6), whole)


def test_the_route_of_a_gpu_learns_the_same(toy_assets, tmp_path, monkeypatch, both_routes):
    """The stage whose loss goes through the frozen Flux; the editor's learns from the adapter's tokens."""
    stage = make("adapter", toy_assets, tmp_path, monkeypatch)

    def run():
        stage.trainables.zero_grad()
        loss, _ = stage.loss(Step(7, 10, 0, stage.name, CPU, range(4), 4))
        loss.backward()
        return [loss.detach(), *(p.grad for p in stage.trainables.parameters() if p.grad is not None)]

    for short, long in zip(*both_routes(run)):
        torch.testing.assert_close(long, short, rtol=1e-3, atol=1e-6)


def test_a_loss_over_pairs_is_not_cut(tmp_path):
    run = RunConfig(tmp_path, max_steps=1, batch=4, micro=2)
    stage = clip.ClipStage(clip.Config(run, tmp_path / "clip.safetensors", tmp_path / "cache", scenes=64), CPU)
    loss, _ = stage.loss(Step(0, 1, 0, "clip", CPU, range(4), 4))
    assert loss.isfinite()
    with pytest.raises(ValueError, match="compares the samples of a batch"):
        check(stage, run, World.start("cpu"))
