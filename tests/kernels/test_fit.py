"""A fit through a toy flow with a known answer, and what it promises at every step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.embedding import SemanticEmbedding
from semantic_diffusion_adapter.kernels.fit import ORDERS, Fit, FitSettings
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, Hierarchy, Level
from semantic_diffusion_adapter.kernels.text_space import TextSpace, length

WIDTH = 8
TREE = Hierarchy((Level(1, 1, 2), Level(2, 2, 1)))  # 6 tokens


@pytest.fixture
def space() -> TextSpace:
    g = torch.Generator().manual_seed(1)
    return TextSpace(torch.randn(WIDTH, generator=g), 0.2 + torch.rand(WIDTH, generator=g))


@pytest.fixture
def flow():
    """velocity(x, t, tokens, pooled) of a world whose only picture is a linear map of the tokens (and pooled)."""
    paint = torch.randn(6 * WIDTH, 4 * 2 * 2, generator=torch.Generator().manual_seed(2)) / 7

    def velocity(x, t, tokens, pooled):
        picture = (tokens.flatten(1) @ paint).view(-1, 4, 2, 2)
        if pooled is not None:
            picture = picture + pooled.mean(1)[:, None, None, None]
        return (x - picture) / t[:, None, None, None]  # x = (1 - t) picture + t noise

    velocity.paint = lambda tokens: (tokens.flatten(1) @ paint).view(-1, 4, 2, 2)
    return velocity


def target(space: TextSpace, flow, seed: int = 3, batch: int = 1) -> torch.Tensor:
    values = 0.7 * torch.randn(batch, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
    return flow.paint(space.denormalise(values))


@pytest.mark.parametrize("order", ORDERS)
def test_a_fit_finds_tokens_that_paint_the_picture(space, flow, order):
    latents, start = target(space, flow), space.start(TREE)
    fit = Fit(start, space, FitSettings(steps=300, rate=0.1, order=order))
    while not fit.done:
        fit.step(latents, flow)
    found = fit.result()
    before, after = ((flow.paint(e.tokens) - latents).square().mean() for e in (start, found))
    assert after < before / 5
    assert found.source["fit"]["steps"] == 300
    assert torch.equal(found.boxes, start.boxes) and torch.equal(found.strengths, start.strengths)


def test_a_picture_does_not_depend_on_what_is_fitted_beside_it(space, flow):
    both = torch.cat([target(space, flow, 3), target(space, flow, 4)])

    def fitted(latents):
        fit = Fit(space.start(TREE, len(latents)), space, FitSettings(steps=20))
        for _ in range(20):
            fit.step(latents, flow)
        return fit.result().tokens

    assert torch.allclose(fitted(both), torch.cat([fitted(both[:1]), fitted(both[1:])]), atol=1e-5)
    assert torch.equal(fitted(both), fitted(both)), "the noise is the seed's"


def test_other_seeds_have_other_noise_and_pairs_are_opposite(space):
    fit = Fit(space.start(TREE), space, FitSettings())
    latents = torch.zeros(1, 4, 2, 2)
    first, _ = fit.draw(latents)
    fit.count = 1
    second, _ = fit.draw(latents)
    other, _ = Fit(space.start(TREE), space, FitSettings(seed=1)).draw(latents)
    assert torch.equal(first, -second) and not torch.allclose(first, other)


def test_times_cover_all_of_the_flow_and_every_second_leans_to_the_noise(space):
    fit = Fit(space.start(TREE), space, FitSettings(shift=1.0))
    times = []
    for fit.count in range(64):
        times.append(float(fit.draw(torch.zeros(1, 4, 2, 2))[1]))
    even, odd = torch.tensor(times[::2]), torch.tensor(times[1::2])
    assert all(((even >= k / 8) & (even < (k + 1) / 8)).any() for k in range(8))
    assert odd.mean() > even.mean() + 0.05 and 0 < min(times) and max(times) < 1


def test_coarse_levels_learn_first(space, flow):
    start, latents = space.start(TREE), target(space, flow)
    fit = Fit(start, space, FitSettings(steps=100, order="coarse first"))
    for _ in range(19):
        fit.step(latents, flow)
    tokens = fit.tokens()[0]
    fine = start.levels == 1
    assert torch.allclose(tokens[:, fine], start.tokens[:, fine], atol=1e-5)
    assert not torch.allclose(tokens[:, ~fine], start.tokens[:, ~fine], atol=0.01)
    for _ in range(10):
        fit.step(latents, flow)
    assert not torch.allclose(fit.tokens()[0][:, fine], start.tokens[:, fine], atol=0.01)


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.01, 1.0), scale=st.floats(0.1, 30.0))
def test_no_token_becomes_longer_than_the_space_allows(rate, scale):
    space = TextSpace(torch.zeros(WIDTH), torch.ones(WIDTH))
    fit = Fit(space.start(TREE), space, FitSettings(steps=30, rate=rate))
    for _ in range(30):
        fit.step(torch.full((1, 1, 2, 2), scale), lambda x, t, tokens, pooled: scale * tokens.sum() + 0 * x)
    assert length(space.normalise(fit.result().tokens)).max() <= 1 + 1e-5


def test_a_start_that_is_longer_is_kept_as_it_is(space, flow):
    long = space.denormalise(3 * torch.ones(1, 6, WIDTH))
    start = dataclasses.replace(space.start(TREE), tokens=long)
    assert torch.allclose(Fit(start, space, FitSettings()).result().tokens, long, atol=1e-5)


def test_a_fit_that_breaks_down_says_so_and_keeps_what_it_has(space, flow):
    fit = Fit(space.start(TREE), space, FitSettings())
    latents = target(space, flow)
    for _ in range(5):
        fit.step(latents, flow)
    before = fit.result().tokens
    with pytest.raises(ValueError, match="broke down at step 6 .*the loss is nan.*: take a smaller rate"):
        fit.step(latents, lambda x, t, tokens, pooled: x * tokens.sum() * float("nan"))
    assert torch.equal(fit.result().tokens, before) and fit.count == 5
    fit.step(latents, flow)
    assert fit.count == 6


def test_the_pooled_vector_is_fitted_where_it_is_asked_for(space, flow):
    start = dataclasses.replace(space.start(TREE), pooled=torch.randn(1, 5, generator=torch.Generator().manual_seed(0)))
    latents = target(space, flow)
    for pooled in (False, True):
        fit = Fit(start, space, FitSettings(steps=20, pooled=pooled))
        for _ in range(20):
            fit.step(latents, flow)
        assert torch.equal(fit.result().pooled, start.pooled) is not pooled
    with pytest.raises(ValueError, match="has no pooled vector to fit"):
        Fit(space.start(TREE), space, FitSettings(pooled=True))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "at least one step, not 0"),
        ({"rate": 0.0}, "above 0 and at most 1"),
        ({"rate": float("nan")}, "above 0 and at most 1"),
        ({"longest": float("nan")}, "above 0 deviations, not nan"),
        ({"order": "fine first"}, "no order 'fine first': use one of coarse first, all levels"),
    ],
)
def test_wrong_settings_are_a_sentence(wrong, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**wrong)


def test_a_start_of_another_width_is_refused(space):
    start = TextSpace(torch.zeros(4), torch.ones(4)).start(TREE)
    with pytest.raises(ValueError, match="has width 4 and the text space 8: take both from the same model"):
        Fit(start, space, FitSettings())


def test_presets_start_alike_for_every_picture(space):
    start = space.start(PRESETS["tree64"], 3)
    assert isinstance(start, SemanticEmbedding) and start.hierarchy() == PRESETS["tree64"]
    assert torch.equal(start.tokens[0], start.tokens[2]) and torch.equal(start.tokens, space.start(PRESETS["tree64"], 3).tokens)
