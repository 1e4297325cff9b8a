"""Living with others: what else an artist hangs on the same Flux, each against core's own attention with a dense mask."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.controlnet  # noqa: E402
import comfy.ldm.flux.math  # noqa: E402
import comfy.ldm.modules.attention  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import node_helpers  # noqa: E402
from semantic_diffusion_adapter.kernels import visibility  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
OVERRIDE = "optimized_attention_override"
LORA = {"double_blocks.0.img_attn.qkv": (192, 64), "txt_in": (64, 24), "single_blocks.1.linear1": (448, 64)}


def with_lora(model, strength: float = 1.0, seed: int = 0):
    """The MODEL under a small LoRA on attention, text and a single block, through core's loader."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, (rows, columns) in LORA.items():
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) / 4
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) / 4
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def one(e, index: int):
    """The embedding of one image of a batch."""
    return dataclasses.replace(e, tokens=e.tokens[index : index + 1], pooled=e.pooled[index : index + 1])


@pytest.mark.parametrize("images, embeddings", [(3, 1), (3, 2), (1, 2)])
def test_unequal_batches_go_together_as_core_repeats_them(toy, embedding, images, embeddings):
    many, model = embedding(batch=embeddings), flux.patch(toy.model)
    together = toy.sample(model, to_conditioning(many, toy.plain()), batch=images)
    assert together.shape[0] == images
    noise = comfy.sample.prepare_noise(torch.zeros(images, 8, 8, 8), 0)
    for i in range(images):
        positive = to_conditioning(one(many, i % embeddings), toy.plain())
        with torch.no_grad():
            alone = comfy.sample.sample(
                model, noise[i : i + 1], 2, 1.0, "euler", "simple", positive, positive, torch.zeros(1, 8, 8, 8), disable_pbar=True
            )
        assert torch.allclose(together[i : i + 1], alone, **CLOSE)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (2, 40), (3, 33), (41, 1)])
def test_a_latent_with_fewer_patches_than_cells(toy, embedding, size):
    """A patch that lies in many cells sees them all."""
    e = embedding("tree64")
    positive = to_conditioning(e)
    expected = toy.sample(toy.dense(toy.model, e, visibility.patch_grid(*size), 64), positive, size=size)
    assert torch.allclose(toy.sample(flux.patch(toy.model), positive, size=size), expected, **CLOSE)


def test_lora_before_or_after_the_patch(toy, embedding):
    e = embedding()
    positive = to_conditioning(e)
    bare = toy.sample(flux.patch(toy.model), positive)
    before = toy.sample(flux.patch(with_lora(toy.model)), positive)
    after = toy.sample(with_lora(flux.patch(toy.model)), positive)
    expected = toy.sample(toy.dense(with_lora(toy.model), e, (4, 4), 64), positive)
    assert torch.equal(before, after) and torch.allclose(before, expected, **CLOSE)
    assert not torch.allclose(before, bare, **CLOSE), "the LoRA must do something"
    assert torch.equal(toy.sample(flux.patch(toy.model), positive), bare), "and nothing once it is gone"


def test_two_branches_of_one_graph_do_not_see_each_other(toy, embedding):
    """Three models made of one, sampled in turns, each with settings of its own."""
    positive = to_conditioning(embedding(), toy.plain())
    branches = [
        flux.patch(toy.model, strength=0.5),
        flux.patch(with_lora(toy.model), mixing="overlap"),
        with_lora(toy.model, 0.5, seed=1),
    ]
    first = [toy.sample(branch, positive) for branch in branches]
    second = [toy.sample(branch, positive) for branch in reversed(branches)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.allclose(first[0], first[1], **CLOSE) and not torch.allclose(first[1], first[2], **CLOSE)
    for branch in branches:
        assert OVERRIDE not in branch.model_options["transformer_options"]
    assert OVERRIDE not in toy.model.model_options["transformer_options"]


def test_inpainting_leaves_what_is_not_masked(toy, embedding):
    e = embedding()
    positive = to_conditioning(e)
    latent, mask = torch.randn(1, 8, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 3:] = 1

    def inpaint(model):
        noise = comfy.sample.prepare_noise(latent, 0)
        with torch.no_grad():
            return comfy.sample.sample(
                model, noise, 3, 1.0, "euler", "simple", positive, positive, latent, noise_mask=mask, disable_pbar=True
            )

    result = inpaint(flux.patch(toy.model))
    assert torch.allclose(result[..., :3], latent[..., :3], **CLOSE)
    assert torch.allclose(result, inpaint(toy.dense(toy.model, e, (4, 4), 64)), **CLOSE)
    assert not torch.allclose(result, inpaint(toy.model), **CLOSE)


def test_flux_fill_reads_picture_and_mask_beside_the_noise(toy, embedding):
    """FLUX.1-Fill has 8 + 8 + 64 channels here, of which 8 are painted; core's InpaintModelConditioning gives the rest."""
    toy.network.img_in = comfy.ops.manual_cast.Linear(4 * (8 + 8 + 64), 64)
    torch.nn.init.normal_(toy.network.img_in.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(toy.network.img_in.bias)
    e = embedding()
    beside = {"concat_latent_image": torch.randn(1, 8, 7, 9), "concat_mask": torch.rand(1, 1, 56, 72).round()}
    positive = node_helpers.conditioning_set_values(to_conditioning(e), beside)
    result = toy.sample(flux.patch(toy.model), positive, size=(7, 9))
    expected = toy.sample(toy.dense(toy.model, e, (4, 5), 64), positive, size=(7, 9))
    assert result.shape == (1, 8, 7, 9) and torch.allclose(result, expected, **CLOSE)


def test_reference_latents_in_a_batch_with_a_prompt(toy, embedding):
    """Kontext: the layout, the prompt and the references of a batch all keep their place in the sequence."""
    many, references = embedding(batch=2), {"reference_latents": [torch.randn(1, 8, 5, 6)]}
    positive = node_helpers.conditioning_set_values(to_conditioning(many, toy.plain()), references)
    expected = toy.sample(toy.dense(toy.model, many, (4, 4), 64 + 5, references=9), positive, batch=2)
    assert torch.allclose(toy.sample(flux.patch(toy.model), positive, batch=2), expected, **CLOSE)


class Recorder(comfy.controlnet.ControlBase):
    """A ControlNet that adds to the first block of either kind and writes down what it was given to read."""

    def __init__(self):
        super().__init__()
        self.read = []

    def get_control(self, x, timestep, cond, *rest):
        self.read.append(cond.get("crossattn_controlnet", cond["c_crossattn"]))
        patches = -(-x.shape[2] // 2) * -(-x.shape[3] // 2)
        ramp = torch.linspace(-1, 1, patches * 64).reshape(1, patches, 64).expand(len(x), -1, -1)
        return {"input": [ramp, None], "output": [2 * ramp], "middle": []}


def test_a_controlnets_additions_arrive_and_stay_outside_the_regions(toy, embedding):
    e, control = embedding(), Recorder()
    without = to_conditioning(e, toy.plain())
    positive = node_helpers.conditioning_set_values(without, {"control": control, "control_apply_to_uncond": True})
    result = toy.sample(flux.patch(toy.model), positive, size=(8, 6))
    oracle = toy.dense(toy.model, e, (4, 3), 64 + 5)
    assert torch.allclose(result, toy.sample(oracle, positive, size=(8, 6)), **CLOSE)
    assert not torch.allclose(result, toy.sample(flux.patch(toy.model), without, size=(8, 6)), **CLOSE)


def test_what_a_controlnet_is_given_to_read_does_not_reach_flux(toy, embedding):
    """Core's `cross_attn_controlnet` is for the ControlNet alone."""
    control, (prompt, _) = Recorder(), toy.plain(7, seed=4)[0]
    positive = node_helpers.conditioning_set_values(
        to_conditioning(embedding()), {"control": control, "control_apply_to_uncond": True}
    )
    told = node_helpers.conditioning_set_values(positive, {"cross_attn_controlnet": prompt})
    model = flux.patch(toy.model)
    assert torch.equal(toy.sample(model, told), toy.sample(model, positive))
    assert torch.equal(control.read[0], prompt)


def test_a_controlnet_reads_the_prompt_else_the_tokens_of_the_whole_image(toy, embedding):
    """It knows no boxes: regions would all speak to it at once."""
    e, text, model = embedding("tree64"), toy.plain(), flux.patch(toy.model)
    behind_another = to_conditioning(embedding("global16", seed=1), text)
    for positive, expected in (
        (to_conditioning(e, text), text[0][0]),
        (to_conditioning(e, behind_another), text[0][0]),
        (to_conditioning(e), e.tokens[:, :16]),
    ):
        control = Recorder()
        toy.sample(model, node_helpers.conditioning_set_values(positive, {"control": control}))
        assert torch.equal(control.read[0], expected)


def test_an_attention_of_the_user_that_drops_masks(toy, embedding, monkeypatch):
    """SageAttention accepts a mask and ignores it: it must be kept, never be given one, and the regions must hold."""
    attention_pytorch = comfy.ldm.modules.attention.attention_pytorch
    masks = []

    def attention_sage(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
        masks.append(mask)
        return attention_pytorch(q, k, v, heads, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)

    e = embedding()
    positive = to_conditioning(e, toy.plain())
    expected = toy.sample(toy.dense(toy.model, e, (4, 4), 64 + 5), positive)
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", comfy.ldm.modules.attention.wrap_attn(attention_sage))
    assert torch.allclose(toy.sample(flux.patch(toy.model), positive), expected, **CLOSE)
    assert masks and all(mask is None for mask in masks)


def test_fp8_weights(toy, embedding):
    """As Load Diffusion Model's `fp8_e4m3fn`: stored in 8 bits, computed in the manual cast's dtype."""
    e = embedding()
    positive = to_conditioning(e)
    full = toy.sample(flux.patch(toy.model), positive)
    try:
        toy.network.to(torch.float8_e4m3fn)
        toy.network.dtype = torch.float8_e4m3fn
        toy.model.model.manual_cast_dtype = torch.float32
        expected = toy.sample(toy.dense(toy.model, e, (4, 4), 64), positive)
    except (NotImplementedError, RuntimeError) as reason:
        pytest.skip(f"this PyTorch or core cannot cast fp8 weights on the CPU: {reason}")
    result = toy.sample(flux.patch(toy.model), positive)
    assert toy.network.img_in.weight.dtype == torch.float8_e4m3fn
    assert torch.allclose(result, expected, **CLOSE)
    assert not torch.allclose(result, full, **CLOSE), "8 bits must show"


class Packed(torch.nn.Module):
    """A linear layer as GGUF and other quantised files have it: no `weight` of its own to read, cast or copy."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax() / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed.to(x.dtype) * self.scale, self.offset)


def test_quantised_layers_without_weights(toy, embedding):
    for module in list(toy.network.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Packed(child))
    e = embedding()
    positive = to_conditioning(e)
    expected = toy.sample(toy.dense(toy.model, e, (4, 4), 64), positive)
    assert torch.allclose(toy.sample(flux.patch(toy.model), positive), expected, **CLOSE)


def test_interrupted_in_the_middle_of_a_forward_and_rerun(toy, embedding, monkeypatch):
    positive = to_conditioning(embedding())
    model = flux.patch(toy.model)
    text, expected = toy.sample(toy.model, toy.plain()), toy.sample(model, positive)

    def interrupt(*args, **kwargs):
        raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as broken:
        broken.setattr(toy.network.single_blocks[1], "forward", interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            toy.sample(model, positive)
    assert torch.equal(toy.sample(model, positive), expected)
    assert torch.equal(toy.sample(toy.model, toy.plain()), text)


def test_a_patched_model_is_given_back(toy, embedding):
    """After *Unload models* and with the graph gone, nothing of ours may keep the network alive."""
    model = flux.patch(toy.model)
    toy.sample(model, to_conditioning(embedding()))
    network = weakref.ref(toy.network)
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    del model
    vars(toy).clear()
    gc.collect()
    assert network() is None
