"""Preview Embedding is shown and passed on; Visible Patches is the mask that the sampling used."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import folder_paths  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from semantic_diffusion_adapter.kernels.embedding import MASK_SIDE  # noqa: E402
from semantic_diffusion_adapter.nodes.host import conditioning, flux  # noqa: E402
from semantic_diffusion_adapter.nodes.see import PreviewEmbedding, VisiblePatches  # noqa: E402


def test_the_preview_is_an_image_and_is_shown(embedding, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    e = embedding(batch=2)
    node = PreviewEmbedding.PREPARE_CLASS_CLONE({})
    done = node.execute(e, "token norm", torch.rand(1, 40, 64, 3))
    (image,) = done.result
    assert image.shape == (2, 320, 512, 3) and 0 <= image.min() <= image.max() <= 1
    shown = done.ui.as_dict()["images"]
    assert len(shown) == 2 and all(entry["type"] == "temp" for entry in shown)
    with Image.open(tmp_path / "temp" / shown[1]["filename"]) as file:
        assert np.abs(np.asarray(file) - image[1].numpy() * 255).max() <= 1
    edited = dataclasses.replace(e, tokens=e.tokens * 1.5)
    same, changed = (node.execute(one, "change", None, e).result[0] for one in (e, edited))
    assert same.shape == (2, 512, 512, 3) and not torch.equal(same, changed)
    with pytest.raises(ValueError, match="connect one to compare"):
        node.execute(e, "change")


def regional(embedding):
    """Tokens that are boxed, masked softly, weakened and switched off."""
    e = embedding("tree64")
    masks = torch.linspace(0, 1, MASK_SIDE).round(decimals=1).expand(1, MASK_SIDE, -1).contiguous()
    strengths = e.strengths.clone()
    strengths[:4], strengths[20] = math.log(0.5), -torch.inf
    return dataclasses.replace(e, strengths=strengths, masks=masks, masked_by=torch.arange(64).remainder(3).clamp(max=1) - 1)


@pytest.mark.parametrize("size", [(8, 8), (7, 11)])
def test_it_is_the_mask_that_sampling_used(toy, embedding, monkeypatch, size):
    e, used = regional(embedding), []

    def spy(*arguments, **named):
        used.append(region_bias(*arguments, **named))
        return used[-1]

    region_bias = flux.region_bias
    monkeypatch.setattr(flux, "region_bias", spy)
    toy.sample(flux.patch(toy.model), conditioning.to_conditioning(e), size=size, steps=1)
    rows, cols = -(-size[0] // 2), -(-size[1] // 2)
    weight = used[0][-rows * cols :].exp().clamp(max=1)
    latent = {"samples": torch.zeros(2, 8, *size)}
    for level, token, chosen in ((-1, -1, slice(None)), (2, -1, e.levels == 2), (1, 5, [16 + 5]), (-1, 20, [20])):
        (mask,) = VisiblePatches.execute(e, latent, level, token).result
        assert mask.shape == (1, size[0] * 8, size[1] * 8) and mask.dtype == torch.float32
        patches = mask[0, ::16, ::16]
        assert torch.allclose(patches, weight[:, chosen].mean(1).reshape(rows, cols), atol=3e-3), "masks travel as bytes"
        large = patches.repeat_interleave(16, 0).repeat_interleave(16, 1)
        assert torch.equal(mask[0], large[: size[0] * 8, : size[1] * 8])


def test_bad_choices_are_one_sentence(embedding):
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    for level, token, words in ((5, -1, "no level 5"), (-1, 64, "no token 64"), (0, 16, "level 0 has 16")):
        with pytest.raises(ValueError, match=words) as caught:
            VisiblePatches.execute(embedding(), latent, level, token)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_video_latent_counts_by_its_picture_size(embedding):
    assert VisiblePatches.execute(embedding(), {"samples": torch.zeros(1, 16, 3, 6, 10)}, -1, -1).result[0].shape == (1, 48, 80)
