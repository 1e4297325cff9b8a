"""The adapter's objective on toy networks of random weights."""
from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.visibility import visible  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, build_tower  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, velocity  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402
from semantic_diffusion_adapter.training.objectives import reconstruct  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import (  # noqa: E402
    AdapterObjective,
    AdapterTraining,
    Batch,
    named_hierarchy,
    regions_for,
)

DIM = 20
TOWER = TowerConfig("dino", "dinov2", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
                                       "patch_size": 14, "mlp_ratio": 2}, 56, 14, 16, (0.5,) * 3, (0.5,) * 3)


def toy_flux(depth: int = 1, single: int = 1):
    torch.manual_seed(0)
    flux = build_flux(dict(hidden_size=24, num_heads=2, depth=depth, depth_single_blocks=single, axes_dim=[4, 4, 4],
                           context_in_dim=DIM, vec_in_dim=6, in_channels=4, guidance_embed=False, patch_size=2))
    return flux.eval().requires_grad_(False), attend_by_region(flux)


def objective(**settings) -> AdapterObjective:
    flux, attention = toy_flux()
    adapter = Adapter(AdapterConfig(PRESETS["tree128"].to_json(), (TOWER,), width=32, heads=2, layers=2, out_dim=DIM))
    towers = {"dino": build_tower(TOWER).requires_grad_(False)}
    return AdapterObjective(flux, attention, adapter, towers, AdapterTraining(**settings))


def step(number: int, seed: int = 0) -> Step:
    """Step `number` of ten, with a batch of two."""
    return Step(number, 10, seed, "adapter", torch.device("cpu"), range(2), 2)


def batch() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("preset", ["global16", "tree64", "tree128"])
def test_one_step_reaches_the_adapter_and_nothing_else(preset, masked):
    toy = objective(growth=((1.0, preset),), masked=masked)
    loss, parts = toy.loss(batch(), step(5))
    loss.backward()
    assert torch.isfinite(loss) and loss.item() == pytest.approx(parts["flow"].item() + 0.02 * parts["similarity"].item(), rel=1e-5)
    gradients = {name: p.grad for name, p in toy.adapter.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    active = named_hierarchy(preset).index_in(PRESETS["tree128"])
    rows = gradients["queries"].abs().sum(-1)
    learning = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, active, True)
    assert torch.equal(rows > 0, learning), "only the preset's queries learn"
    assert all(p.grad is None for module in (toy.flux, toy.towers["dino"]) for p in module.parameters())


@pytest.mark.parametrize("preset", ["tree64", "tree128"])
def test_the_route_of_a_gpu_learns_the_same(preset, both_routes):
    def run():
        toy = objective(growth=((1.0, preset),))
        loss, _ = toy.loss(batch(), step(5))
        loss.backward()
        return [loss.detach(), *(p.grad for p in toy.adapter.parameters())]

    for short, long in zip(*both_routes(run)):
        torch.testing.assert_close(long, short, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_time_that_the_network_is_told_is_the_one_that_its_picture_was_mixed_for(monkeypatch, dtype):
    """bf16 rounds a time by up to 1/256 of it."""
    toy, told, mixed = objective(), [], []
    toy.flux.to(dtype)
    toy.flux.time_text_embed.register_forward_pre_hook(lambda module, given: told.append(given[0].double() / 1000))
    monkeypatch.setattr(reconstruct, "velocity", lambda flux, x, *rest: mixed.append(x[:, 0, 0, 0].double()) or velocity(flux, x, *rest))
    t = torch.linspace(0.001, 0.999, 40)
    hierarchy = PRESETS["tree64"]
    toy.flow(torch.zeros(40, 4, 8, 8), torch.ones(40, 4, 8, 8), t, torch.zeros(40, 64, DIM), torch.zeros(40, 6), hierarchy)
    torch.testing.assert_close(mixed[0], told[0], rtol=1e-6, atol=0)
    assert (mixed[0] - t).abs().max() < 1 / 128


def test_steps_lower_the_loss():
    toy = objective(growth=((1.0, "tree64"),), similarity=0.0)
    optimizer = torch.optim.Adam(toy.adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss, _ = toy.loss(batch(), step(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_step_is_a_pure_function_of_its_number_and_seed():
    toy = objective()
    losses = [toy.loss(batch(), step(9, seed))[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("preset", ["tree64", "tree128"])
def test_a_patch_gives_no_gradient_to_tokens_whose_box_it_does_not_touch(preset):
    """In a Flux of one block, where nothing can travel through other patches, exactly the visible tokens get gradient."""
    flux, attention = toy_flux(depth=1, single=0)
    hierarchy = named_hierarchy(preset)
    attention.regions = regions_for(hierarchy, (4, 4), torch.device("cpu"))
    torch.manual_seed(2)
    tokens = torch.randn(1, hierarchy.token_count, DIM, requires_grad=True)
    out = velocity(flux, torch.randn(1, 4, 8, 8), torch.tensor([0.5]), tokens, torch.zeros(1, 6))
    seen = visible(hierarchy.boxes(), (4, 4))
    for patch in (0, 6, 15):
        row, col = divmod(patch, 4)
        (gradient,) = torch.autograd.grad(out[..., 2 * row:2 * row + 2, 2 * col:2 * col + 2].sum(), tokens, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, seen[patch])


def test_growth_goes_through_its_phases():
    settings = AdapterTraining(growth=((0.1, "global16"), (0.5, "global32"), (1.0, "tree64", "tree128")))
    assert [settings.presets(p) for p in (0.0, 0.1, 0.49, 0.5, 1.0)] == [
        ("global16",), ("global32",), ("global32",), ("tree64", "tree128"), ("tree64", "tree128")]


def test_levels_are_left_out_from_either_end():
    whole = PRESETS["tree128"].levels
    settings = AdapterTraining(growth=((1.0, "tree128"),), level_dropout=0.3, coarse_dropout=0.4)
    drawn = [settings.draw(Step(n, 400, 0, "adapter", torch.device("cpu"), range(2), 2)).levels for n in range(400)]
    shares = {kept: drawn.count(kept) / 400 for kept in set(drawn)}
    assert shares.keys() == {whole, whole[:1], whole[:2], whole[1:], whole[2:]}
    assert shares[whole] == pytest.approx(0.3, abs=0.08) and shares[whole[1:]] + shares[whole[2:]] == pytest.approx(0.4, abs=0.08)
    alone = AdapterTraining(growth=((1.0, "global16"),), coarse_dropout=1.0)
    assert alone.draw(step(5)).levels == PRESETS["global16"].levels, "a single level is never left out"


def test_unlocking_frees_the_last_block_of_dinov2_only():
    toy = objective(unlock_blocks=1)
    freed = toy.unlock()
    tower = toy.towers["dino"]
    assert freed and {id(p) for p in freed} == {id(p) for p in tower.blocks[-1].parameters()}
    assert {id(p) for p in tower.parameters() if p.requires_grad} == {id(p) for p in freed}
    loss, _ = toy.loss(batch(), step(9))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in freed)


def test_names_of_hierarchies():
    assert named_hierarchy("tree128") is PRESETS["tree128"] and named_hierarchy("global64").to_json() == [[1, 1, 64]]
    with pytest.raises(ValueError, match="Unknown preset 'tree65'"):
        named_hierarchy("tree65")


@pytest.mark.parametrize("shares", [dict(level_dropout=0.6, coarse_dropout=0.5), dict(coarse_dropout=-0.1)])
def test_shares_of_the_batches_add_up(shares):
    with pytest.raises(ValueError, match="add up to at most 1"):
        AdapterTraining(**shares)


def test_a_part_of_the_picture_comes_with_its_tokens():
    tree = PRESETS["tree128"]
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 4, 8, 8)
    tokens = torch.arange(3.0)[:, None, None].expand(3, 128, DIM)
    x, mixed = reconstruct.composed(latents, tokens, tree, (0.5, 0, 1, 0.5))
    assert x[0, 0, :4, 4:].eq(1).all() and x[1, 0, :4, 4:].eq(0).all(), "the two of a pair exchange the quadrant"
    assert x[0, 0, 4:].eq(0).all() and x[0, 0, :4, :4].eq(0).all() and x[2].eq(2).all(), "an odd last one stays"
    boxes = tree.boxes()
    inside = (boxes[:, 0] >= 0.5) & (boxes[:, 3] <= 0.5)
    assert torch.equal(mixed[0, :, 0] == 1, inside) and int(inside.sum()) == 8 + 4 * 4
    alone = named_hierarchy("global16")
    assert reconstruct.composed(latents, tokens[:, :16], alone, (0, 0, 0.5, 0.5))[0] is latents


def test_composed_batches_are_drawn_by_their_share(monkeypatch):
    asked = []
    monkeypatch.setattr(reconstruct, "composed", lambda x, tokens, *part: asked.append(part) or (x, tokens))
    never, always = objective(composed=0.0), objective(composed=1.0)
    batch = Batch(torch.randn(4, 4, 8, 8), torch.rand(4, 3, 56, 56))
    step = Step(3, 10, 0, "adapter", torch.device("cpu"), range(4), 4)
    never.loss(batch, step)
    assert not asked
    always.loss(batch, Step(3, 10, 0, "adapter", torch.device("cpu"), range(4), 4))
    assert len(asked) == 1 and asked[0][-1] in reconstruct.PARTS
