"""Attribute edits through core's own modules and hooks, against FluxSpace's three streams written out (arXiv 2412.09611)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.model_management  # noqa: E402
from comfy.ldm.flux.math import apply_rope  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from semantic_diffusion_adapter.nodes.host import attribute_mask, directions, flux, reference_gate, source_gate  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

from .flow_edits import SOURCE, latent, ours, paint  # noqa: E402

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SHARES = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Newer cores rotate by a kernel that has no float64, but not while they train."""
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)


def text(length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, length, 24, generator=generator, dtype=torch.float64),
            torch.randn(1, 24, generator=generator, dtype=torch.float64))  # fmt: skip


def conditioning(known: tuple[Tensor, Tensor]) -> list:
    return [[known[0], {"pooled_output": known[1]}]]


def attention(block, streams: list[Tensor], pe: Tensor) -> list:
    """[of the text, of the image, (q, k, v) of either]: the joint attention of both, modulated, before the projections."""
    parts = []
    for side, stream in zip((block.txt_attn, block.img_attn), streams):
        q, k, v = side.qkv(stream).unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
        parts.append((*side.norm(q, k, v), v))
    q, k, v = (torch.cat(each, 2) for each in zip(*parts))
    q, k = apply_rope(q, k, pe)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return [out[:, : streams[0].shape[1]], out[:, streams[0].shape[1] :], parts]


def three_streams(network, x, t, base, edits, empty, strengths, threshold, amount, control=None) -> Tensor:
    """One forward of a toy Flux with text streams of the base, of every edit and of the empty prompt over one image stream."""
    img, ids = network.process_img(x)
    img = network.img_in(img)
    rows = len(img)

    def vec_of(pooled: Tensor) -> Tensor:
        from comfy.ldm.flux.layers import timestep_embedding

        return network.time_in(timestep_embedding(t, 256).to(img.dtype)) + network.vector_in(pooled.expand(rows, -1))

    p, moved = base[1], base[1]
    for _, pooled in edits:
        at_right_angles = pooled - (pooled * moved).sum() / (moved.square().sum() + 1e-10) * moved
        moved = (1 - amount) * moved + amount * at_right_angles if amount else moved
    vec, vec_text = vec_of(p), vec_of(moved)
    texts = [network.txt_in(known[0].expand(rows, -1, -1)) for known in (base, *edits, empty)]
    for block in network.double_blocks:
        (s1, s2), (t1, t2) = block.img_mod(vec), block.txt_mod(vec_text)
        image = (1 + s1.scale) * block.img_norm1(img) + s1.shift
        outs, heards, masks = [], [], []
        for words in texts:
            pe = network.pe_embedder(torch.cat([torch.zeros(rows, words.shape[1], 3), ids], 1))
            said = (1 + t1.scale) * block.txt_norm1(words) + t1.shift
            of_text, of_image, parts = attention(block, [said, image], pe)
            outs.append(block.img_attn.proj(of_image))
            heards.append(of_text)
            scores = parts[1][0] @ parts[0][1].mT / parts[0][1].shape[-1] ** 0.5
            m = scores.softmax(-1)[..., 0].mean(1)
            m = (m - m.amin(1, keepdim=True)) / (m.amax(1, keepdim=True) - m.amin(1, keepdim=True))
            m = torch.sigmoid(10 * (m - 0.5))
            masks.append(torch.where(m >= threshold, m, 0) if threshold else torch.ones_like(m))
        a, n = outs[0], outs[-1]
        steered = a.clone()
        for number, strength in enumerate(strengths, 1):
            e = outs[number]
            d = e - (e * n).sum(-1, keepdim=True) / (n.square().sum(-1, keepdim=True) + 1e-10) * n
            steered = steered + strength * masks[number].unsqueeze(-1) * d
        steered = steered * a.norm(dim=-1, keepdim=True) / steered.norm(dim=-1, keepdim=True)
        img = img + s1.gate * steered
        img = img + s2.gate * block.img_mlp((1 + s2.scale) * block.img_norm2(img) + s2.shift)
        for number, words in enumerate(texts):
            words = words + t1.gate * block.txt_attn.proj(heards[number])
            texts[number] = words + t2.gate * block.txt_mlp((1 + t2.scale) * block.txt_norm2(words) + t2.shift)
    pe = network.pe_embedder(torch.cat([torch.zeros(rows, texts[0].shape[1], 3), ids], 1))
    joint = torch.cat([texts[0], img], 1)
    for block in network.single_blocks:
        joint = block(joint, vec=vec, pe=pe)
    out = network.final_layer(joint[:, texts[0].shape[1] :], vec)
    height, width = (-(-side // 2) for side in x.shape[-2:])
    out = out.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return out[..., : x.shape[-2], : x.shape[-1]]


def forward(model, x: Tensor, t: Tensor, known: tuple[Tensor, Tensor], **more) -> Tensor:
    """The network's own forward as the sampler calls it on a patched model."""
    network, rows = model.get_model_object("diffusion_model"), len(x)
    wrappers = {kind: dict(each) for kind, each in model.wrappers.items()}
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: wrappers.get(WrappersMP.DIFFUSION_MODEL, {})}, "cond_or_uncond": [0]}
    with torch.no_grad():
        return network(x, t, known[0].expand(rows, -1, -1), known[1].expand(rows, -1), transformer_options=options, **more)


@pytest.mark.parametrize("count, batch, size, threshold, amount", [
    (1, 1, (8, 8), 0.0, 0.0), (1, 2, (7, 9), 0.5, 0.4), (2, 1, (6, 8), 0.5, 0.0), (2, 2, (8, 8), 0.0, 0.7),
])  # fmt: skip
def test_equals_three_streams_written_out(toy, count, batch, size, threshold, amount):
    toy.network.double()
    base, empty, edits = text(5, 1), text(5, 2), [text(5, 3 + number) for number in range(count)]
    x, t = torch.randn(batch, 8, *size, dtype=torch.float64), torch.full((batch,), 0.6, dtype=torch.float64)
    strengths = [2.5, -1.5][:count]
    model = toy.model
    for edit, strength in zip(edits, strengths):
        model = directions.patch(model, conditioning(edit), conditioning(empty), strength, False, amount, threshold)
    with torch.no_grad():
        expected = three_streams(toy.network, x, t, base, edits, empty, strengths, threshold, amount)
        plain = toy.network(x, t, base[0].expand(batch, -1, -1), base[1].expand(batch, -1))
    found = forward(model, x, t, base)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - plain).abs().max() > 1e-3, "it steers at all"
    assert torch.equal(forward(toy.model, x, t, base), plain), "no hook may outlive its forward"


def test_other_lengths_of_text_are_what_they_are_alone(toy):
    toy.network.double()
    base, empty, edit = text(9, 1), text(4, 2), text(6, 3)
    x, t = torch.randn(1, 8, 8, 8, dtype=torch.float64), torch.full((1,), 0.6, dtype=torch.float64)
    with torch.no_grad():
        expected = three_streams(toy.network, x, t, base, [edit], empty, [3.0], 0.5, 0.0)
    for first in (toy.model, flux.patch(toy.model)):
        model = directions.patch(first, conditioning(edit), conditioning(empty), 3.0, False)
        torch.testing.assert_close(forward(model, x, t, base), expected, **CLOSE)


def test_nothing_asked_is_core_bit_for_bit(toy):
    base, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 2, 3))
    before = toy.sample(toy.model, base)
    for change in (
        dict(strength=0.0), dict(strength=0.0, coarse=0.0, bounded=False), dict(strength=5.0, region=torch.zeros(1, 64, 64)),
        dict(strength=5.0, start=1.0, end=1.0),
    ):  # fmt: skip
        assert torch.equal(toy.sample(directions.patch(toy.model, edit, empty, **change), base), before)
    steered = directions.patch(toy.model, edit, empty, 0.5)
    first = toy.sample(steered, base)
    assert not torch.equal(first, before) and torch.equal(toy.sample(steered, base), first)
    assert torch.equal(toy.sample(toy.model, base), before), "nothing may survive outside the clone"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in toy.network.modules())


def test_the_coarse_edit_alone_needs_no_companions(toy):
    base, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 2, 3))
    rows = []
    model = directions.patch(toy.model, edit, empty, 0.0, coarse=0.5)
    handle = toy.network.img_in.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    try:
        found = toy.sample(model, base)
    finally:
        handle.remove()
    assert set(rows) == {1} and not torch.equal(found, toy.sample(toy.model, base))


def test_only_positives_are_steered_and_single_blocks_see_no_companion(toy):
    base, negative, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 6, 2, 3))
    model = directions.patch(toy.model, edit, empty, 0.5)
    rows = {"double": [], "single": []}
    handles = [toy.network.double_blocks[0].register_forward_hook(lambda _, args, out: rows["double"].append(len(out[0]))),
               toy.network.single_blocks[1].register_forward_hook(lambda _, args, out: rows["single"].append(len(out)))]  # fmt: skip
    try:
        guided = toy.sample(model, base, negative, cfg=3.0, steps=1)
    finally:
        [handle.remove() for handle in handles]
    assert rows == {"double": [4], "single": [2]}
    positive, other = toy.sample(model, base, steps=1), toy.sample(toy.model, negative, steps=1)
    torch.testing.assert_close(guided, other + 3.0 * (positive - other), rtol=1e-3, atol=1e-3)


def test_boxes_are_obeyed_by_the_painted_rows_alone(toy, embedding):
    """A direction of strength near nothing leaves what Masked Attention paints, whichever node stands first."""
    e, edit, empty = embedding("tree64", seed=1), toy.plain(7, seed=2), toy.plain(7, seed=3)
    base = to_conditioning(e)
    expected = toy.sample(flux.patch(toy.model), base)
    orders = (lambda model: directions.patch(flux.patch(model), edit, empty, 1e-6),
              lambda model: flux.patch(directions.patch(model, edit, empty, 1e-6)))  # fmt: skip
    made = [toy.sample(order(toy.model), base) for order in orders]
    torch.testing.assert_close(made[0], expected, **SHARES)
    torch.testing.assert_close(made[1], expected, **SHARES)
    strong = [toy.sample(step(toy.model), base) for step in (
        lambda model: directions.patch(flux.patch(model), edit, empty, 0.8),
        lambda model: flux.patch(directions.patch(model, edit, empty, 0.8)))]  # fmt: skip
    assert torch.equal(*strong) and not torch.allclose(strong[0], expected, **SHARES)


def test_a_region_bounds_where_it_acts_at_first(toy):
    base, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 2, 3))
    region = torch.zeros(1, 64, 64)
    region[:, :32, :32] = 1
    seen = {}

    def first(model, name):
        outs = []
        handle = toy.network.double_blocks[0].img_mlp.register_forward_pre_hook(lambda _, args: outs.append(args[0].clone()))
        try:
            toy.sample(model, base, steps=1)
        finally:
            handle.remove()
        seen[name] = outs[0][0].unflatten(0, (4, 4))

    first(toy.model, "plain")
    first(directions.patch(toy.model, edit, empty, 1.0, threshold=0.0, region=region), "steered")
    changed = (seen["plain"] - seen["steered"]).abs().amax(-1) > 1e-4
    assert changed[:2, :2].all() and changed.sum() == 4


def test_the_bounded_strength_adds_its_share(toy):
    """What is added is `strength` times as large as the attention's own output, over the tokens of a picture."""
    toy.network.double()
    base, empty, edit = text(5, 1), text(5, 2), text(5, 3)
    x, t = torch.randn(1, 8, 8, 8, dtype=torch.float64), torch.full((1,), 0.6, dtype=torch.float64)
    raw = []
    handle = toy.network.double_blocks[0].img_attn.proj.register_forward_hook(lambda _, args, out: raw.append(out.clone()))
    try:
        forward(directions.patch(toy.model, conditioning(edit), conditioning(empty), 0.25, threshold=0.0), x, t, base)
    finally:
        handle.remove()
    a, e, n = raw[0]
    d = e - (e * n).sum(-1, keepdim=True) / (n.square().sum(-1, keepdim=True) + 1e-10) * n
    strength = float(0.25 * a.norm() / d.norm())
    found, same = (
        forward(directions.patch(toy.model, conditioning(edit), conditioning(empty), *scale, threshold=0.0, blocks="double 0"), x, t, base)
        for scale in ((0.25,), (strength, False))
    )
    torch.testing.assert_close(found, same, **CLOSE)


def test_a_batch_is_its_pictures_one_by_one(toy):
    base, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 2, 3))
    region = torch.zeros(2, 64, 64)
    region[0, :32], region[1, 32:] = 1, 1
    x, t = torch.randn(2, 8, 8, 8), torch.full((2,), 0.6)
    known = (base[0][0], base[0][1]["pooled_output"])
    both = forward(directions.patch(toy.model, edit, empty, 0.5, region=region), x, t, known)
    for row in range(2):
        model = directions.patch(toy.model, edit, empty, 0.5, region=region[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], forward(model, x[row : row + 1], t[:1], known), **SHARES)


def test_in_a_flow_edit_the_edited_side_alone_is_pushed(toy):
    """One conditioning on both sides: at strength 0 the source comes back, and what moves is the push."""
    edit, empty = (toy.plain(5, seed=seed) for seed in (2, 3))
    start = latent()
    kinds = []
    handle = toy.network.double_blocks[0].register_forward_hook(lambda _, args, out: kinds.append(len(out[0])))
    try:
        still = paint(ours(directions.patch(toy.model, edit, empty, 0.0), SOURCE, SOURCE))
        pushed = paint(ours(directions.patch(toy.model, edit, empty, 0.5), SOURCE, SOURCE))
    finally:
        handle.remove()
    torch.testing.assert_close(still, start["samples"], **SHARES)
    assert (pushed - start["samples"]).abs().max() > 0.01
    assert set(kinds) == {2, 4}, "two sides, and with the push two companions of the edited one alone"


def test_control_and_references_come_along(toy):
    import node_helpers

    base, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 2, 3))
    told = node_helpers.conditioning_set_values(base, {"reference_latents": [torch.randn(1, 8, 5, 6)]})
    model = directions.patch(toy.model, edit, empty, 1e-6)
    torch.testing.assert_close(toy.sample(model, told), toy.sample(toy.model, told), **SHARES)
    x, t, known = torch.randn(2, 8, 8, 8), torch.full((2,), 0.6), (base[0][0], base[0][1]["pooled_output"])
    control = {"input": [torch.randn(2, 16, 64)], "output": [torch.randn(2, 16, 64), torch.randn(1, 16, 64)]}
    plain = forward(toy.model, x, t, known, control=control)
    torch.testing.assert_close(forward(model, x, t, known, control=control), plain, **SHARES)
    assert not torch.allclose(plain, forward(toy.model, x, t, known), **SHARES)


@pytest.mark.parametrize("change, words", [
    (dict(strength=float("nan")), "must be a finite number"), (dict(coarse=1.5), "coarse amount of an attribute lies"),
    (dict(threshold=-0.1), "threshold of an attribute lies"), (dict(start=0.6, end=0.5), "swap them"),
    (dict(blocks="single 0"), "There is no single block 0"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused_at_once(toy, change, words):
    with pytest.raises(ValueError, match=words):
        directions.patch(toy.model, toy.plain(5), toy.plain(5), **{"strength": 1.0, **change})


def test_what_does_not_go_together_is_one_sentence(toy):
    base, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 2, 3))
    steered = directions.patch(toy.model, edit, empty, 0.5)
    latent = {"samples": torch.randn(1, 8, 8, 8)}
    for gated in (source_gate.patch(steered, edit, latent), reference_gate.patch(steered, strength=0.5)):
        with pytest.raises(ValueError, match="Attribute Edit and a gate do not work on one model together"):
            toy.sample(gated, base)
    with pytest.raises(ValueError, match="has 3 masks for 2 pictures"):
        toy.sample(directions.patch(toy.model, edit, empty, 0.5, region=torch.ones(3, 64, 64)), base, batch=2)
    other = [[torch.randn(1, 5, 16), {"pooled_output": torch.randn(1, 24)}]]
    with pytest.raises(ValueError, match="widths 16 and 24: encode all of them with the CLIP"):
        toy.sample(directions.patch(toy.model, other, other, 0.5), base)
    toy.network.double_blocks[0].compile()
    with pytest.raises(ValueError, match="does not reach into a compiled model"):
        toy.sample(steered, base)


def test_the_mask_that_is_shown_is_the_one_that_acts(toy):
    """By hand from the queries and keys of every block and noise, of the last direction, within its region."""
    base, edit, empty = (toy.plain(5, seed=seed) for seed in (1, 2, 3))
    region = torch.zeros(1, 64, 64)
    region[:, :, :32] = 1
    model = directions.patch(toy.model, toy.plain(5, seed=4), empty, 0.5)
    model = directions.patch(model, edit, empty, 0.5, threshold=0.3, region=region)
    queries, keys = [], []
    handles = []
    for block in toy.network.double_blocks:
        handles.append(block.img_attn.norm.register_forward_hook(lambda _, args, out: queries.append(out[0][0])))
        handles.append(block.txt_attn.norm.register_forward_hook(lambda _, args, out: keys.append(out[1][2])))
    latent = {"samples": torch.randn(1, 8, 6, 8)}
    try:
        found = attribute_mask.attribute_mask(model, base, latent, 2, 0)
    finally:
        [handle.remove() for handle in handles]
    expected = []
    for q, k in zip(queries, keys):  # rows: painted, one edit, the other, empty
        m = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[..., 0].mean(0)
        m = torch.sigmoid(10 * ((m - m.min()) / (m.max() - m.min()) - 0.5))
        expected.append(torch.where(m >= 0.3, m, 0).reshape(3, 4) * torch.tensor([1.0, 1, 0, 0]))
    assert len(expected) == 4
    torch.testing.assert_close(found[0], torch.stack(expected).mean(0), **SHARES)
    for wrong, words in ((toy.model, "has no Attribute Edit"), (directions.patch(toy.model, edit, empty, 0.0), "does nothing here")):
        with pytest.raises(ValueError, match=words):
            attribute_mask.attribute_mask(wrong, base, latent, 2, 0)
