"""Directions against their formulas written out in float64, and what must hold for any numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.directions import bounded, coarse, orthogonal, relevance, steered

B, N, D = 2, 5, 6
seeds = st.integers(0, 10_000)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(-5, 15))
def test_a_step_is_the_paper_s_token_by_token(seed, strength):
    a, e, n = (random(seed + place, B, N, D) for place in range(3))
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = steered(a, orthogonal(e, n), strength, mask)
    for row in range(B):
        for token in range(N):
            base, edit, empty = a[row, token], e[row, token], n[row, token]
            d = edit - (edit @ empty) / (empty @ empty + 1e-10) * empty
            moved = base + strength * mask[row, token] * d
            torch.testing.assert_close(found[row, token], moved * base.norm() / moved.norm(), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_nothing_is_moved_bit_for_bit_where_nothing_pushes(seed, dtype):
    a, e, n = (random(seed + place, B, N, D, dtype=dtype) for place in range(3))
    d = orthogonal(e, n)
    assert torch.equal(steered(a, d, 0.0), a) and torch.equal(steered(a, d * 0, 5.0), a)
    mask = torch.ones(B, N)
    mask[0, 2] = 0
    found = steered(a, d, 3.0, mask)
    assert found.dtype == dtype and torch.equal(found[0, 2], a[0, 2]) and not torch.equal(found[1, 2], a[1, 2])


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_push_is_linear_and_at_right_angles_and_keeps_the_length(seed, one, other):
    a, e, n = (random(seed + place, B, N, D) for place in range(3))
    d = orthogonal(e, n)
    assert (d * n).sum(-1).abs().max() < 1e-8
    torch.testing.assert_close(steered(a, d, one).norm(dim=-1), a.norm(dim=-1))
    # Before the rescale: what is added along the direction, seen from the base's own share of the result.
    for strength in (one, other):
        found = steered(a, d, strength)
        scale = found.norm(dim=-1, keepdim=True) / (a + strength * d).norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found / scale - a, strength * d, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(steered(a, one * d, 1.0), steered(a, d, one))


def test_zero_vectors_are_no_trouble():
    zero, x = torch.zeros(B, N, D), random(0, B, N, D, dtype=torch.float32)
    assert torch.equal(orthogonal(x, zero), x) and torch.equal(orthogonal(zero, x), zero)
    assert torch.isfinite(steered(zero, x, 2.0)).all()
    assert torch.isfinite(steered(x, -x, 1.0)).all(), "what is pushed to nothing"
    assert torch.equal(bounded(x, zero, 0.3), torch.zeros(B, 1, 1))
    assert torch.isfinite(coarse(torch.zeros(B, D), x[:, 0], 0.5)).all()


@settings(deadline=None, max_examples=20)
@given(seeds, st.floats(0.01, 2))
def test_a_bounded_strength_adds_its_share_in_each_sample(seed, share):
    a, d = random(seed, B, N, D), random(seed + 1, B, N, D) * torch.tensor([1.0, 30.0], dtype=torch.float64)[:, None, None]
    strength = bounded(a, d, share)
    for row in range(B):
        added = (strength[row] * d[row]).norm()
        torch.testing.assert_close(added, share * a[row].norm())
    mask = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.float64)
    masked = bounded(a, d, share, mask) * mask[..., None] * d
    torch.testing.assert_close(masked.norm(dim=(1, 2)), share * a.norm(dim=(1, 2)))
    with pytest.raises(ValueError, match="share of a direction"):
        bounded(a, d, -0.1)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_a_mask_is_a_sample_s_own(seed):
    """The published code stretches it over the whole batch."""
    q, k = random(seed, B, 3, N, D), random(seed + 1, B, 3, 4, D)
    together = relevance(q, k, 0.0)
    for row in range(B):
        torch.testing.assert_close(relevance(q[row : row + 1], k[row : row + 1], 0.0)[0], together[row])
    heard = (q @ k.transpose(-1, -2) / D**0.5).softmax(-1)[..., 0].mean(1)
    place = (heard - heard.amin(1, keepdim=True)) / (heard.amax(1, keepdim=True) - heard.amin(1, keepdim=True))
    torch.testing.assert_close(together, torch.sigmoid(10 * (place - 0.5)))
    cut = relevance(q, k, 0.5)
    assert torch.equal(cut == 0, together < 0.5) and torch.equal(cut[cut > 0], together[together >= 0.5])


def test_a_mask_of_equals_and_thresholds_outside():
    q, k = torch.ones(1, 2, N, D), torch.ones(1, 2, 4, D)
    assert torch.equal(relevance(q, k, 0.5), torch.full((1, N), 0.5)) and not relevance(q, k, 0.6).any()
    with pytest.raises(ValueError, match="threshold of a direction's mask"):
        relevance(q, k, 1.5)


@settings(deadline=None, max_examples=20)
@given(seeds, st.floats(0.01, 1))
def test_a_coarse_edit_is_the_paper_s(seed, amount):
    p, e = random(seed, B, D), random(seed + 1, B, D)
    away = e - (e * p).sum(-1, keepdim=True) / (p * p).sum(-1, keepdim=True) * p
    torch.testing.assert_close(coarse(p, e, amount), (1 - amount) * p + amount * away)
    assert coarse(p, e, 0.0) is p
    with pytest.raises(ValueError, match="coarse amount"):
        coarse(p, e, 1.1)
