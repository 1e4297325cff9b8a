"""What Masked Attention refuses, in one sentence each."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

# What the classes of every kind ask for when they are made without a network.
CONFIG = {"in_channels": 4, "hidden_size": 64, "disable_unet_model_creation": True}


@pytest.mark.parametrize("kind", ["SD15", "SDXL", "Flux2"])
def test_another_kind_of_model_is_refused_by_name(toy, kind):
    """Flux.2's network is of FLUX.1's class."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this core does not know {kind}")
    base = getattr(comfy.supported_models, kind)(CONFIG).get_model({})
    base.diffusion_model = toy.network
    if kind != "Flux2":
        base.diffusion_model = openaimodel.UNetModel(
            image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=[1], channel_mult=(1,), num_heads=1,
            transformer_depth=[0], transformer_depth_output=[0, 0], transformer_depth_middle=-2,
            operations=comfy.ops.manual_cast, dtype=torch.float32,
        )  # fmt: skip
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=f"works on FLUX.1 models and this is {kind}: load a FLUX.1 model"):
        flux.patch(comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu))


@pytest.mark.parametrize(
    "kind, changes, name",
    [
        ("LongCatImage", {}, "LongCatImage"),
        ("Flux", {}, "such as LongCat-Image"),
        ("Flux", {"txt_norm": True, "yak_mlp": True}, "Ovis-Image"),
    ],
)
def test_a_network_whose_text_has_positions_is_refused_by_name(toy, kind, changes, name):
    """They are of FLUX.1's class; core knows Ovis-Image, and at first LongCat-Image, by the network's numbers only."""
    import comfy.ldm.flux.model
    import comfy.model_patcher
    import comfy.supported_models

    fields = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    if not hasattr(comfy.supported_models, kind) or not {"txt_ids_dims", *changes} <= set(fields):
        pytest.skip("this core does not know it")
    base = getattr(comfy.supported_models, kind)(CONFIG).get_model({})
    base.diffusion_model = toy.make(txt_ids_dims=[1, 2], **changes)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=f"works on FLUX.1 models and this is .*{name}: load a FLUX.1 model"):
        flux.patch(comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu))


def test_refusals(toy, embedding):
    e = embedding()
    with pytest.raises(ValueError, match="start_percent"):
        flux.patch(toy.model, start=0.7, end=0.2)
    with pytest.raises(ValueError, match="strength"):
        flux.patch(toy.model, strength=-1.0)
    with pytest.raises(ValueError, match="no single block 2: this model has 2"):
        flux.patch(toy.model, blocks="single 0-2")
    model = flux.patch(toy.model)
    with pytest.raises(ValueError, match="width 16 and this model reads 24"):
        toy.sample(model, to_conditioning(embedding(width=16)))
    cut = [[tokens[:, :10], settings] for tokens, settings in to_conditioning(e)]
    with pytest.raises(ValueError, match="10 tokens but a layout of 64"):
        toy.sample(model, cut)
    narrow = [[tokens, {**settings, "pooled_output": torch.zeros(1, 8)}] for tokens, settings in to_conditioning(e)]
    with pytest.raises(ValueError, match="pooled vector has width 8"):
        toy.sample(model, narrow)
