"""The statistics of a text space, and embeddings that begin in it."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, Hierarchy, Level
from semantic_diffusion_adapter.kernels.text_space import TextSpace, length

TREE = Hierarchy((Level(1, 1, 2), Level(2, 2, 1)))


def outputs(count: int = 40, width: int = 16) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    scale = 0.1 + torch.rand(width, generator=g)
    return [torch.randn(int(5 + k), width, generator=g) * scale + 2 for k in range(count)]


def test_the_statistics_are_those_of_all_vectors_together():
    texts = outputs()
    space, everything = TextSpace.of(iter(texts)), torch.cat(texts)
    assert torch.allclose(space.mean, everything.mean(0), atol=1e-5)
    assert torch.allclose(space.deviation, everything.std(0), atol=1e-5)
    with pytest.raises(ValueError, match="two or more vectors, not 1"):
        TextSpace.of([torch.zeros(1, 4)])


def test_a_constant_channel_divides_nothing_by_zero():
    space = TextSpace.of([torch.ones(5, 3)])
    assert torch.isfinite(space.normalise(torch.ones(1, 2, 3))).all()


def test_normalised_tokens_come_back_and_are_as_long_as_texts():
    texts = outputs()
    space = TextSpace.of(texts)
    tokens = torch.cat(texts)[None]
    values = space.normalise(tokens)
    assert torch.allclose(space.denormalise(values), tokens, atol=1e-5)
    assert abs(float(length(values).square().mean()) - 1) < 0.01
    held = space.hold(3 * values, torch.tensor(1.25))
    assert length(held).max() <= 1.25 + 1e-5
    short = 0.01 * values
    assert torch.equal(space.hold(short, torch.tensor(1.25)), short)


def test_a_prompt_is_cut_to_the_hierarchy_or_filled_up_by_the_start():
    space = TextSpace.of(outputs())
    begun = space.start(TREE)
    long, short = torch.randn(1, 9, 16), torch.randn(1, 4, 16)
    assert torch.equal(space.start_from(long, TREE).tokens, long[:, :6])
    made = space.start_from(short, TREE, batch=2)
    assert made.batch == 2 and torch.equal(made.tokens[1, :4], short[0])
    assert torch.equal(made.tokens[:, 4:], begun.tokens[:, 4:].expand(2, -1, -1))


def test_distances_tell_texts_from_what_is_far_away():
    space = TextSpace.of(outputs())
    g = torch.Generator().manual_seed(5)
    near = space.start(PRESETS["tree64"])
    near = type(near)(space.denormalise(torch.randn(2, 64, 16, generator=g)), near.boxes, near.levels, near.strengths)
    found = space.distances(near)
    assert abs(found["deviation"] - 1) < 0.1 and abs(found["norm"] - 1) < 0.1 and found["mean"] < 0.25 and found["cosine"] < 0.12
    far = type(near)(near.tokens * 4 + 3, near.boxes, near.levels, near.strengths)
    assert space.distances(far)["norm"] > 3 and space.distances(far)["cosine"] > found["cosine"]
