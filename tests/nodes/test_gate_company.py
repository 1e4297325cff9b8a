"""The gates beside nodes that run or skip the model's blocks, and when they are interrupted: they work, or one sentence says what
to remove."""

from __future__ import annotations

import node_helpers
import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.model_management  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux, reference_gate, source_gate  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

from .test_flux_company import assert_no_hooks, deaf, every_block, without_wrappers  # noqa: E402

GATES = ["Source Gate", "Reference Gate"]


def latent(seed: int) -> torch.Tensor:
    return torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def gated(toy, what: str, **settings: object):
    if what == "Source Gate":
        return source_gate.patch(toy.model, toy.plain(5, seed=2), {"samples": latent(3)}, **settings)
    return reference_gate.patch(toy.model, **{"text_gate": 0.0, **settings})


def told(toy) -> list:
    """A prompt with a reference, which the one gate is for and the other one takes along."""
    return node_helpers.conditioning_set_values(toy.plain(5), {"reference_latents": [latent(4)]})


@pytest.mark.parametrize("what", GATES)
@pytest.mark.parametrize("which", [slice(0, 4), slice(3, 4)])
def test_blocks_that_do_not_hand_the_options_on(toy, what, which):
    for block in every_block(toy)[which]:
        deaf(block)
    with pytest.raises(ValueError, match=f"gate does not reach.*another node .such as TeaCache.*: remove that node, or {what}.$"):
        toy.sample(gated(toy, what), told(toy))
    assert_no_hooks(toy)


@pytest.mark.parametrize("what", GATES)
def test_a_forward_past_core_s_wrappers(toy, what):
    without_wrappers(toy)
    with pytest.raises(ValueError, match="gate does not reach this model's attention"):
        toy.sample(gated(toy, what), told(toy))
    assert_no_hooks(toy)


UNREAD = [("Source Gate", {"strength": 0.0}), ("Source Gate", {"start": 1.0}), ("Source Gate", {"mask": torch.ones(1, 64, 64)}),
          ("Reference Gate", {"text_gate": 1.0}), ("Reference Gate", {"strength": 0.0, "start": 1.0})]  # fmt: skip


@pytest.mark.parametrize("what, unread", UNREAD)
def test_nothing_is_said_where_nothing_is_read(toy, what, unread):
    for block in every_block(toy):
        deaf(block)
    assert torch.equal(toy.sample(gated(toy, what, **unread), told(toy)), toy.sample(toy.model, told(toy)))


def test_nothing_is_said_where_there_is_no_reference(toy):
    for block in every_block(toy):
        deaf(block)
    assert torch.equal(toy.sample(gated(toy, "Reference Gate", strength=0.0), toy.plain(5)), toy.sample(toy.model, toy.plain(5)))


@pytest.mark.parametrize("what", GATES)
def test_other_blocks_may_go_their_own_way(toy, what):
    deaf(toy.network.single_blocks[1])
    found = toy.sample(gated(toy, what, blocks="double"), told(toy))
    assert not torch.equal(found, toy.sample(toy.model, told(toy)))


@pytest.mark.parametrize("what", GATES)
def test_the_boxes_are_watched_beside_a_gate(toy, embedding, what):
    positive = node_helpers.conditioning_set_values(to_conditioning(embedding("tree64")), {"reference_latents": [latent(4)]})
    source = to_conditioning(embedding("tree64", seed=5))
    model = flux.patch(toy.model)
    if what == "Source Gate":
        model = source_gate.patch(model, source, {"samples": latent(3)})
    else:
        model = reference_gate.patch(model, text_gate=0.0)
    toy.sample(model, positive)
    for block in every_block(toy):
        deaf(block)
    with pytest.raises(ValueError, match="(boxes do|gate does) not reach this model's attention"):
        toy.sample(model, positive)
    assert_no_hooks(toy)


@pytest.mark.parametrize("what", GATES)
def test_interrupted_and_rerun_it_is_the_same_picture(toy, what):
    model, stop = gated(toy, what), comfy.model_management.InterruptProcessingException
    plain, expected = toy.sample(toy.model, told(toy)), toy.sample(model, told(toy))

    def interrupt(block, inputs):
        raise stop

    handle = toy.network.single_blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(stop):
        toy.sample(model, told(toy))
    handle.remove()
    assert_no_hooks(toy)
    assert torch.equal(toy.sample(model, told(toy)), expected) and torch.equal(toy.sample(toy.model, told(toy)), plain)
