"""A file in the published format of FLUX.1-dev, at full width but of one block of each kind, through the stock loader."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.model_management  # noqa: E402
import folder_paths  # noqa: E402
import node_helpers  # noqa: E402
from semantic_diffusion_adapter.kernels import visibility  # noqa: E402
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy  # noqa: E402
from semantic_diffusion_adapter.kernels.fit import FitSettings  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.text_space import TextSpace  # noqa: E402
from semantic_diffusion_adapter.nodes import decode  # noqa: E402
from semantic_diffusion_adapter.nodes.host import directions, reference_gate, source_gate  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402
from semantic_diffusion_adapter.nodes.host.fitting import fit_embedding  # noqa: E402

import nodes as stock  # noqa: E402

WIDTH, TEXT = 3072, 4096


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of FLUX.1-dev's tensors with depth 1 and 1."""
    linear = {
        "img_in": (WIDTH, 64), "txt_in": (WIDTH, TEXT), "final_layer.linear": (64, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH), "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
        "single_blocks.0.linear2": (WIDTH, 5 * WIDTH), "single_blocks.0.modulation.lin": (3 * WIDTH, WIDTH),
    }  # fmt: skip
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        linear |= {f"{name}.in_layer": (WIDTH, width), f"{name}.out_layer": (WIDTH, WIDTH)}
    norms = ["single_blocks.0.norm"]
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        linear |= {
            f"{block}_attn.qkv": (3 * WIDTH, WIDTH), f"{block}_attn.proj": (WIDTH, WIDTH),
            f"{block}_mlp.0": (4 * WIDTH, WIDTH), f"{block}_mlp.2": (WIDTH, 4 * WIDTH), f"{block}_mod.lin": (6 * WIDTH, WIDTH),
        }  # fmt: skip
        norms.append(f"{block}_attn.norm")
    result = {f"{name}.weight": shape for name, shape in linear.items()}
    result |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return result | {f"{norm}.{part}_norm.scale": (128,) for norm in norms for part in ("query", "key")}


@pytest.fixture(scope="module")
def stock_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # prime, so that rows differ
    tensors = {}
    for name, shape in shapes().items():
        count = torch.Size(shape).numel()
        values = noise.repeat(count // len(noise) + 1)[:count].reshape(shape)
        tensors[name] = (values * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) + name.endswith("scale")).bfloat16()
    save_file(tensors, folder / "flux1.safetensors")
    del tensors
    known = {**folder_paths.folder_names_and_paths, "diffusion_models": ([str(folder)], {".safetensors"})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "folder_names_and_paths", known)
        (model,) = stock.UNETLoader().load_unet("flux1.safetensors", "default")
    yield model
    comfy.model_management.unload_all_models()
    del model
    gc.collect()


def test_full_width_flux_from_the_stock_loader(stock_model):
    network = stock_model.get_model_object("diffusion_model")
    assert (network.params.hidden_size, network.params.num_heads, network.params.guidance_embed) == (WIDTH, 24, True)
    grids = PRESETS["tree128"]
    e = from_hierarchy(torch.randn(1, 128, TEXT, generator=torch.Generator().manual_seed(1)), grids)
    (patched,) = decode.MaskedAttention.execute(stock_model, 1.0, 0.0, 1.0, "all").result
    positive = to_conditioning(e)
    (latent,) = stock.EmptyLatentImage().generate(320, 320, 1)

    def sample(model, positive):
        with torch.inference_mode():
            return stock.KSampler().sample(model, 0, 1, 1.0, "euler", "simple", positive, positive, latent, 1.0)[0]["samples"]

    result = sample(patched, positive)
    assert result.shape == (1, 16, 40, 40) and torch.isfinite(result).all()

    bias = visibility.region_bias(e.boxes, e.strengths, (20, 20), 128)

    def dense(func, q, k, v, heads, **kwargs):
        mask = torch.zeros(q.shape[2], q.shape[2])
        mask[:, :128] = bias
        return func(q, k, v, heads, **(kwargs | {"mask": mask.to(q.dtype)}))

    oracle = stock_model.clone()
    oracle.model_options["transformer_options"] = {"optimized_attention_override": dense}
    expected = sample(oracle, [[positive[0][0], {"pooled_output": positive[0][1]["pooled_output"]}]])
    scale = expected.std()
    assert (result - expected).abs().max() < 0.01 * scale


def test_full_width_flux_samples_under_each_gate(stock_model):
    text = torch.randn(1, 8, TEXT, generator=torch.Generator().manual_seed(1))
    positive = [[text, {"pooled_output": torch.zeros(1, 768)}]]
    referring = node_helpers.conditioning_set_values(positive, {"reference_latents": [torch.randn(1, 16, 8, 9)]})
    there = {"samples": torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(2))}
    (latent,), mask = stock.EmptyLatentImage().generate(128, 128, 1), torch.zeros(1, 128, 128)
    mask[:, :64] = 1

    def sample(model, positive):
        with torch.inference_mode():
            return stock.KSampler().sample(model, 0, 1, 1.0, "euler", "simple", positive, positive, latent, 1.0)[0]["samples"]

    for model, asked in (
        (source_gate.patch(stock_model, [[text + 1, positive[0][1]]], there, mask), positive),
        (reference_gate.patch(stock_model, mask, text_gate=0.5), referring),
    ):
        made, plain = sample(model, asked), sample(stock_model, asked)
        assert made.shape == (1, 16, 16, 16) and torch.isfinite(made).all() and not torch.equal(made, plain)


def test_an_attribute_edit_at_full_width(stock_model):
    """Through the published layout, in its own precision, with distilled guidance; a push of nothing is nothing."""
    generator = torch.Generator().manual_seed(4)
    base, edit, empty = (
        [[torch.randn(1, 16, TEXT, generator=generator), {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 3.5}]]
        for _ in range(3)
    )
    latent = {"samples": torch.zeros(1, 16, 8, 8)}

    def sample(model) -> torch.Tensor:
        with torch.inference_mode():
            return stock.KSampler().sample(model, 0, 1, 1.0, "euler", "simple", base, base, latent, 1.0)[0]["samples"]

    plain = sample(stock_model)
    made = sample(directions.patch(stock_model, edit, empty, 0.5, coarse=0.3))
    assert made.shape == plain.shape and torch.isfinite(made).all() and (made - plain).abs().max() > 0.05
    nearly = sample(directions.patch(stock_model, edit, empty, 1e-4, threshold=0.0))
    assert (nearly - plain).abs().max() < 0.1 * (made - plain).abs().max()
    assert torch.equal(sample(directions.patch(stock_model, edit, empty, 0.0)), plain)


def test_a_fit_through_full_width_flux(stock_model):
    """Ten steps for a picture of four patches; the loss falls, and the gradients have passed the check before."""
    space = TextSpace(torch.zeros(TEXT), torch.ones(TEXT))
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        fitted, losses = fit_embedding(stock_model, latents, space.start(PRESETS["global16"]), space, FitSettings(10))
    assert sum(losses[-4:]) < sum(losses[:4]) and torch.isfinite(fitted.tokens).all()
