"""Nodes that change the joint sequence inside of the forward: our tokens are found and masked there, or one sentence says
what to remove."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import node_helpers  # noqa: E402
from semantic_diffusion_adapter.kernels import algebra, visibility  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402
from semantic_diffusion_adapter.nodes.host.override import OVERRIDE_KEY  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXT = 5  # tokens of the prompt beside the embedding
REFERENCES = [(8, 8), (5, 6)]
REFERENCE_TOKENS = 16 + 9


def insert(before: int = 0, after: int = 0, seed: int = 3):
    """A `post_input` patch that puts tokens around the text."""

    def patch(arguments):
        text, ids = arguments["txt"], arguments["txt_ids"]
        generator = torch.Generator().manual_seed(seed)
        one, two = (torch.randn(1, n, text.shape[-1], generator=generator).expand(len(text), -1, -1) for n in (before, after))
        more = (ids.new_zeros(len(ids), n, ids.shape[-1]) for n in (before, after))
        first, last = more
        return arguments | {"txt": torch.cat([one, text, two], 1), "txt_ids": torch.cat([first, ids, last], 1)}

    return patch


def both_orders(toy, change, **options):
    """Our patch before and after a change of the model."""
    yield change(flux.patch(toy.model, **options))
    yield flux.patch(change(toy.model), **options)


def with_patches(*patches):
    def change(model):
        model = model.clone()
        for patch in patches:
            model.set_model_post_input_patch(patch)
        return model

    return change


def oracle(model, e, before: int, text: int, mixing: str = "all"):
    """A clone whose attention is written out with one mask: everything sees our tokens but the patches outside their boxes
    (and, by the mixing, they one another). `text` tokens stand before the patches, ours from `before` on."""
    bias = visibility.region_bias(e.boxes, e.strengths, (4, 4), e.token_count, 0, mixing).double()
    count = e.token_count

    def override(func, q, k, v, heads, **kwargs):
        mask = torch.zeros(q.shape[2], k.shape[2], dtype=torch.float64)
        ours = slice(before, before + count)
        mask[:, ours] = e.strengths.double()
        mask[ours, ours] = bias[:count]
        mask[text : text + 16, ours] = bias[count:]
        logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        return (logits.softmax(-1) @ v.double()).to(q.dtype).transpose(1, 2).flatten(2)

    clone = model.clone()
    clone.model_options["transformer_options"][OVERRIDE_KEY] = override
    return clone


@pytest.mark.parametrize("mixing", ["all", "overlap"])
@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize(
    "patches, before, after",
    [
        ([insert(before=6)], 6, 0),
        ([insert(after=6)], 0, 6),
        ([insert(before=2, after=3), insert(before=4, seed=8)], 6, 3),
        ([insert()], 0, 0),
    ],
    ids=["before", "after", "twice", "none"],
)
def test_inserted_tokens_are_seen_and_see_everything(toy, embedding, patches, before, after, references, mixing):
    e = algebra.with_strength(embedding("tree64"), 0.5, levels={1})
    positive = to_conditioning(e, toy.plain(TEXT))
    if references:
        latents = [torch.randn(1, 8, *size) for size in REFERENCES]
        positive = node_helpers.conditioning_set_values(positive, {"reference_latents": latents})
    change = with_patches(*patches)
    expected = toy.sample(
        oracle(change(toy.model), e, before, before + 64 + TEXT + after, mixing), toy.without_layout(positive), steps=1
    )
    assert not torch.allclose(expected, toy.sample(change(toy.model), positive, steps=1), **CLOSE)
    for model in both_orders(toy, change, mixing=mixing):
        assert torch.allclose(toy.sample(model, positive, steps=1), expected, **CLOSE)
        assert len(model.model_options["transformer_options"]["patches"]["post_input"]) == len(patches)


def test_uso_style_reference(toy, embedding):
    """Core's own node, with a toy projector."""
    import comfy.clip_vision
    import comfy.model_patcher
    import comfy.ops
    from comfy_extras import nodes_model_patch

    projector = nodes_model_patch.SigLIPMultiFeatProjModel(10, 2, 12, 64, operations=comfy.ops.manual_cast)
    with torch.no_grad():
        for number, parameter in enumerate(projector.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 3)
    cpu = torch.device("cpu")
    style = comfy.model_patcher.ModelPatcher(projector, load_device=cpu, offload_device=cpu)
    seen = comfy.clip_vision.Output()
    seen.all_hidden_states, seen.penultimate_hidden_states = torch.randn(1, 27, 10, 12), torch.randn(1, 10, 12)

    def change(model):
        return nodes_model_patch.USOStyleReference().apply_patch(model, style, seen)[0]

    e = embedding("tree64")
    positive = to_conditioning(e, toy.plain(TEXT))
    expected = toy.sample(oracle(change(toy.model), e, 6, 6 + 64 + TEXT), toy.without_layout(positive))
    for model in both_orders(toy, change):
        assert torch.allclose(toy.sample(model, positive), expected, **CLOSE)


def test_flux_kv_cache(toy, embedding):
    """Core's node: from the second step on the references' keys are those of the first, and they have no queries."""
    nodes_flux = pytest.importorskip("comfy_extras.nodes_flux")
    if not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("this core has no FluxKVCache")
    e = embedding("tree64")
    values = {"reference_latents": [torch.randn(1, 8, *size) for size in REFERENCES], "reference_latents_method": "index"}
    positive = node_helpers.conditioning_set_values(to_conditioning(e, toy.plain(TEXT)), values)

    def change(model):
        return nodes_flux.FluxKVCache.execute(model).args[0]

    sizes = []
    dense = oracle(change(toy.model), e, 0, 64 + TEXT)
    attend = dense.model_options["transformer_options"][OVERRIDE_KEY]
    dense.model_options["transformer_options"][OVERRIDE_KEY] = lambda func, q, k, v, heads, **kwargs: (
        sizes.append(k.shape[2] - q.shape[2]) or attend(func, q, k, v, heads, **kwargs)
    )
    expected = toy.sample(dense, toy.without_layout(positive), steps=3)
    assert sizes == [0] * 4 + [REFERENCE_TOKENS] * 8, "there must have been keys without queries"
    for model in both_orders(toy, change):
        assert torch.allclose(toy.sample(model, positive, steps=3), expected, **CLOSE)
    with_style = with_patches(insert(before=6))
    expected = toy.sample(oracle(with_style(change(toy.model)), e, 6, 6 + 64 + TEXT), toy.without_layout(positive), steps=3)
    result = toy.sample(flux.patch(with_style(change(toy.model))), positive, steps=3)
    assert torch.allclose(result, expected, **CLOSE)


def test_a_text_that_was_changed_in_place_is_where_it_was(toy, embedding):
    e = embedding("tree64")
    change = with_patches(lambda arguments: arguments | {"txt": arguments["txt"] * 1.5})
    expected = toy.sample(oracle(change(toy.model), e, 0, 64), toy.without_layout(to_conditioning(e)), steps=1)
    assert torch.allclose(toy.sample(flux.patch(change(toy.model)), to_conditioning(e), steps=1), expected, **CLOSE)


def scaled(arguments):
    return insert(before=6)(arguments | {"txt": arguments["txt"] * 1.5})


def doubled(arguments):
    return arguments | {name: torch.cat([arguments[name]] * 2, 1) for name in ("txt", "txt_ids")}


def cropped(arguments):
    return arguments | {name: arguments[name][:, :9] for name in ("img", "img_ids")}


@pytest.mark.parametrize("patch", [scaled, doubled, cropped])
def test_what_cannot_be_found_is_one_sentence(toy, embedding, patch, monkeypatch):
    change = with_patches(patch)
    e = to_conditioning(embedding("tree64"))
    sentence = r"cannot be placed in this model's attention \(\d+ queries.*: remove {}, or Masked Attention"
    for model in both_orders(toy, change):
        with pytest.raises(ValueError, match=sentence.format("that node")) as caught:
            toy.sample(model, e)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(patch, "__module__", "/home/me/ComfyUI/custom_nodes/ComfyUI-Style_x_2.nodes.patch")
    with pytest.raises(ValueError, match=sentence.format("ComfyUI-Style.2")):
        toy.sample(flux.patch(change(toy.model)), e)


@pytest.mark.parametrize("patch", [scaled, doubled])
def test_nothing_is_said_where_nothing_is_masked(toy, embedding, patch):
    change = with_patches(patch)
    for positive in (toy.plain(9), to_conditioning(embedding("global16"))):
        plain = toy.sample(change(toy.model), toy.without_layout(positive))
        assert torch.equal(toy.sample(flux.patch(change(toy.model)), positive), plain)
