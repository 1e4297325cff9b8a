"""The attention override itself, and which blocks it works in."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import node_helpers  # noqa: E402
from semantic_diffusion_adapter.kernels import algebra, blocks, visibility  # noqa: E402
from semantic_diffusion_adapter.kernels.attention import Regions  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402
from semantic_diffusion_adapter.nodes.host.override import OVERRIDE_KEY as OVERRIDE  # noqa: E402
from semantic_diffusion_adapter.nodes.host.override import regional_attention  # noqa: E402
from semantic_diffusion_adapter.nodes.host.sequence import Sequence  # noqa: E402
from semantic_diffusion_adapter.nodes.host.watch import Watch  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def sequence(e) -> Sequence:
    """Of 64 tokens and a grid of 4 x 4."""
    return Sequence(
        lambda text, references: Regions(visibility.region_bias(e.boxes, e.strengths, (4, 4), text, references)), 64, 16, 0
    )


@pytest.mark.parametrize("skip_reshape", [True, False])
@pytest.mark.parametrize("skip_output_reshape", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_every_shape_in_which_core_calls_attention(embedding, skip_reshape, skip_output_reshape, soft):
    from comfy.ldm.modules.attention import attention_pytorch

    e = algebra.with_strength(embedding(), 0.5 if soft else 1.0)
    bias = visibility.region_bias(e.boxes, e.strengths, (4, 4), 64)
    q, k, v = torch.randn(3, 2, 2, 80, 32)
    full = torch.zeros(80, 80)
    full[:, :64] = bias
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=full.double()).float()
    override = regional_attention(sequence(e), None)
    if not skip_reshape:
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    out = override(attention_pytorch, q, k, v, 2, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    assert torch.allclose(out, expected if skip_output_reshape else expected.transpose(1, 2).flatten(2), atol=1e-5)


def test_an_attention_that_is_not_the_joint_one_is_passed_on(toy, embedding):
    """The watch over the block says whether the joint one came as well; nobody does where there is none."""
    from comfy.ldm.modules.attention import attention_pytorch

    e = embedding()
    override = regional_attention(sequence(e), None, watch=Watch(toy.network, {}, lambda: True))
    q, k, v = torch.randn(1, 2, 7, 32), torch.randn(1, 2, 11, 32), torch.randn(1, 2, 11, 32)
    assert torch.equal(
        override(attention_pytorch, q, k, v, 2, skip_reshape=True), attention_pytorch(q, k, v, 2, skip_reshape=True)
    )
    with pytest.raises(ValueError, match="7 queries, 11 keys.*remove that node, or Masked Attention"):
        regional_attention(sequence(e), None)(attention_pytorch, q, k, v, 2, skip_reshape=True)


@pytest.mark.parametrize("text", ["double", "single 1", "double 0, single 0-0", "double 1-1,SINGLE"])
def test_only_the_chosen_blocks_are_masked(toy, embedding, text):
    chosen = blocks.parse_blocks(text, 2, 2)
    e = embedding("tree64")
    calls = []
    oracle = toy.dense(toy.model, e, (4, 4), 64, where=lambda *here: here in chosen, calls=calls)
    expected = toy.sample(oracle, toy.without_layout(to_conditioning(e)))
    assert len(calls) == 2 * 4
    result = toy.sample(flux.patch(toy.model, blocks=text), to_conditioning(e))
    assert torch.allclose(result, expected, **CLOSE)
    assert not torch.allclose(result, toy.sample(flux.patch(toy.model), to_conditioning(e)), **CLOSE)


def test_another_packs_override_is_chained(toy, embedding):
    """An override that changes the values: it must be asked, and our mask must hold around it."""
    e = embedding("tree64")
    positive = to_conditioning(e)
    seen = []

    def louder(func, q, k, v, heads, **kwargs):
        seen.append(q.shape)
        return func(q, k, v * 1.5, heads, **kwargs)

    model = flux.patch(toy.model)
    model.model_options["transformer_options"][OVERRIDE] = louder
    result = toy.sample(model, positive)
    assert seen
    oracle = toy.dense(toy.model, e, (4, 4), 64)
    dense = oracle.model_options["transformer_options"][OVERRIDE]
    oracle.model_options["transformer_options"][OVERRIDE] = lambda func, q, k, v, heads, **kw: dense(func, q, k, v * 1.5, heads, **kw)
    assert torch.allclose(result, toy.sample(oracle, toy.without_layout(positive)), **CLOSE)
    assert model.model_options["transformer_options"][OVERRIDE] is louder


def test_an_attention_mask_of_the_conditioning_is_added(toy, embedding):
    """A style model after Embedding to Conditioning brings a mask of the whole sequence along."""
    e = embedding("tree64")
    sequence = 64 + 16
    extra = torch.randn(1, sequence, sequence)
    positive = node_helpers.conditioning_set_values(
        to_conditioning(e), {"attention_mask": extra, "attention_mask_img_shape": (4, 4)}
    )

    def with_mask(func, q, k, v, heads, mask=None, **kwargs):
        bias = visibility.region_bias(e.boxes, e.strengths, (4, 4), 64).double()
        full = extra[0].double().clone()
        full[:, :64] += bias
        logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]) + full
        return (logits.softmax(-1) @ v.double()).to(q.dtype).transpose(1, 2).flatten(2)

    oracle = toy.model.clone()
    oracle.model_options["transformer_options"] = {OVERRIDE: with_mask}
    result = toy.sample(flux.patch(toy.model), positive)
    assert torch.allclose(result, toy.sample(oracle, toy.without_layout(positive)), **CLOSE)
