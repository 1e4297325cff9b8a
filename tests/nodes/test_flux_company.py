"""The patch beside nodes that run, skip or compile the model's blocks: the boxes hold, or one sentence says what to remove."""

from __future__ import annotations

import types

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from comfy.patcher_extension import WrappersMP  # noqa: E402
from semantic_diffusion_adapter.kernels import algebra  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SENTENCE = r"boxes do not reach this model's attention, because {}.*: remove that node, or Masked Attention"


def every_block(toy) -> list:
    return [*toy.network.double_blocks, *toy.network.single_blocks]


def deaf(block) -> None:
    """The block as TeaCache's and PuLID's forwards call it."""
    forward = block.forward
    block.forward = lambda *inputs, transformer_options=None, **more: forward(*inputs, **more)


def without_wrappers(toy) -> None:
    """A forward of the whole network that goes past core's wrappers, as RES4LYF's does."""
    toy.network.forward = types.MethodType(
        lambda self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None, transformer_options={}, **more:
        self._forward(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **more),
        toy.network,
    )  # fmt: skip


def count_forwards(toy) -> list:
    forwards = []
    forward = toy.network.forward_orig
    toy.network.forward_orig = lambda *inputs, **more: forwards.append(0) or forward(*inputs, **more)
    return forwards


def assert_no_hooks(toy) -> None:
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in every_block(toy))


@pytest.mark.parametrize("which", [slice(0, 4), slice(0, 1), slice(3, 4)])
def test_blocks_that_do_not_hand_the_options_on(toy, embedding, which):
    positive = to_conditioning(embedding("tree64"))
    for block in every_block(toy)[which]:
        deaf(block)
    forwards = count_forwards(toy)
    with pytest.raises(ValueError, match=SENTENCE.format(r"another node \(such as TeaCache or PuLID\)")) as caught:
        toy.sample(flux.patch(toy.model), positive)
    assert "\n" not in str(caught.value) and len(forwards) == 1, "at the first step"
    assert_no_hooks(toy)


def test_a_forward_past_core_s_wrappers(toy, embedding):
    without_wrappers(toy)
    with pytest.raises(ValueError, match=SENTENCE.format("another node")):
        toy.sample(flux.patch(toy.model), to_conditioning(embedding("tree64")))
    assert_no_hooks(toy)


def test_the_sentence_names_the_pack_that_runs_the_blocks(toy, embedding):
    """By the folder from which ComfyUI loaded the function."""
    deaf(toy.network.single_blocks[1])
    forward = toy.network.forward_orig
    teacache = lambda self, *inputs, **more: forward(*inputs, **more)  # noqa: E731
    teacache.__module__ = "C:\\ComfyUI\\custom_nodes\\ComfyUI-TeaCache.nodes"
    toy.network.forward_orig = types.MethodType(teacache, toy.network)
    with pytest.raises(ValueError, match=SENTENCE.format("ComfyUI-TeaCache runs its blocks")):
        toy.sample(flux.patch(toy.model), to_conditioning(embedding("tree64")))


@pytest.mark.parametrize("change", [lambda toy: [deaf(block) for block in every_block(toy)], without_wrappers])
def test_nothing_is_said_where_no_box_is_ignored(toy, embedding, change):
    tree = embedding("tree64")
    unused = (
        (toy.plain(9), {}),
        (to_conditioning(embedding("global16")), {}),
        (to_conditioning(tree), {"start": 1.0}),
    )
    plain = [toy.sample(toy.model, toy.without_layout(positive)) for positive, _ in unused]
    change(toy)
    for (positive, options), expected in zip(unused, plain):
        assert torch.equal(toy.sample(flux.patch(toy.model, **options), positive), expected)


def test_blocks_that_were_not_chosen_may_be_deaf(toy, embedding):
    positive = to_conditioning(embedding("tree64"))
    model = flux.patch(toy.model, blocks="double 1, single")
    expected = toy.sample(model, positive)
    deaf(toy.network.double_blocks[0])
    assert torch.equal(toy.sample(model, positive), expected)


def test_skipped_blocks_ignore_nothing(toy, embedding):
    """Core's Skip Layer Guidance samples once more without some blocks."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    positive = to_conditioning(algebra.with_strength(embedding("tree64"), 0.5))
    skip = dict(scale=2.0, start_percent=0.0, end_percent=1.0, double_layers="1", single_layers="0, 1")
    guided = toy.sample(flux.patch(SkipLayerGuidanceDiT.execute(toy.model, **skip).args[0]), positive)
    again = toy.sample(SkipLayerGuidanceDiT.execute(flux.patch(toy.model), **skip).args[0], positive)
    assert torch.equal(guided, again)
    assert not torch.allclose(guided, toy.sample(flux.patch(toy.model), positive), **CLOSE)


@pytest.mark.parametrize("first", [True, False])
def test_skipped_forwards_ignore_nothing(toy, embedding, first):
    """Core's EasyCache, which answers most of these steps without the model."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    cache = dict(reuse_threshold=9.0, start_percent=0.0, end_percent=1.0, verbose=False)
    forwards = count_forwards(toy)
    model = toy.model
    for step in (flux.patch, lambda model: EasyCacheNode.execute(model, **cache).args[0])[:: 1 if first else -1]:
        model = step(model)
    toy.sample(model, to_conditioning(embedding("tree64")), steps=8)
    assert 0 < len(forwards) < 8


def test_replaced_blocks_that_call_core_s(toy, embedding):
    positive = to_conditioning(embedding("tree64"))
    expected = toy.sample(flux.patch(toy.model), positive)
    model = flux.patch(toy.model)
    seen = []
    for kind in ("double_block", "single_block"):
        for index in range(2):
            model.set_model_patch_replace(
                lambda args, extra: seen.append(0) or extra["original_block"](args), "dit", kind, index
            )
    assert torch.equal(toy.sample(model, positive), expected) and len(seen) == 2 * 4


def test_blocks_within_one_module(toy, embedding):
    """A first-block cache stands in the place of all blocks of a kind and calls them itself."""

    class Group(torch.nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.blocks = blocks

        def forward(self, img, txt, **more):
            for block in self.blocks:
                img, txt = block(img=img, txt=txt, **more)
            return img, txt

    positive = to_conditioning(embedding("tree64"))
    model = flux.patch(toy.model)
    expected = toy.sample(model, positive)
    blocks = toy.network.double_blocks
    toy.network.double_blocks = torch.nn.ModuleList([Group(blocks)])
    assert torch.equal(toy.sample(model, positive), expected)
    deaf(blocks[1])
    with pytest.raises(ValueError, match=SENTENCE.format("another node")):
        toy.sample(model, positive)


def compile_network(toy) -> None:
    toy.network.forward = torch.compile(toy.network.forward, backend="eager")


def compile_blocks(toy) -> None:
    for blocks in (toy.network.double_blocks, toy.network.single_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="eager")


def compile_in_place(toy) -> None:
    for block in every_block(toy):
        block.compile(backend="eager")


def compile_by_core(toy) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    set_torch_compile_wrapper(toy.model, "eager")


def a_style(arguments):
    """A `post_input` patch that puts three tokens before the text."""
    return arguments | {name: torch.cat([arguments[name][:, :3] * 0, arguments[name]], 1) for name in ("txt", "txt_ids")}


@pytest.mark.parametrize(
    "how, style", [(compile_network, False), (compile_blocks, True), (compile_in_place, False), (compile_by_core, True)]
)
def test_a_compiled_model_gives_the_same(toy, embedding, how, style):
    positive = to_conditioning(embedding())
    del toy.network.double_blocks[1:], toy.network.single_blocks[1:]  # tracing takes its time for each
    if style:
        toy.model.set_model_post_input_patch(a_style)
    expected = toy.sample(flux.patch(toy.model), positive, steps=1)
    torch._dynamo.reset()  # else what was compiled before counts against the limit, beyond which nothing is compiled
    counters.clear()
    how(toy)
    model = flux.patch(toy.model)
    assert torch.allclose(toy.sample(model, positive, steps=1), expected, **CLOSE)
    assert counters["stats"]["calls_captured"] > 0, "nothing was compiled"
    assert_no_hooks(toy)


def test_the_watch_is_gone_after_each_forward(toy, embedding):
    """And there while it runs, though another wrapper of core's may be around it."""
    seen = []

    def look(executor, *inputs, **more):
        seen.append(sum(len(block._forward_hooks) for block in every_block(toy)))
        out = executor(*inputs, **more)
        return out

    model = flux.patch(toy.model)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    toy.sample(model, to_conditioning(embedding("tree64")))
    assert seen == [4, 4]
    assert_no_hooks(toy)
    toy.sample(model, toy.plain(5))
    assert seen == [4, 4, 0, 0]


def test_patching_twice_is_patching_once(toy, embedding):
    positive = to_conditioning(embedding())
    twice = flux.patch(flux.patch(toy.model, strength=0.5), strength=1.5)
    assert torch.equal(toy.sample(twice, positive), toy.sample(flux.patch(toy.model, strength=1.5), positive))


def test_a_saved_patch_survives_clones_and_keeps_no_second_model(toy, embedding):
    positive = to_conditioning(embedding())
    patched = flux.patch(toy.model)
    again = patched.clone().clone()
    assert again.model is toy.model.model
    assert torch.equal(toy.sample(again, positive), toy.sample(patched, positive))
