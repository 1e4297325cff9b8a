"""FlowEdit's rule against the paper's step, and noise that is a function of its key."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels.flow_edit import coupled, interval
from semantic_diffusion_adapter.kernels.noise import own_noise


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_two_sides_are_the_papers():
    z, source, noise = (random(2, 3, 4, 5, seed=seed) for seed in range(3))
    time = torch.tensor([0.3, 0.8], dtype=torch.float64).reshape(2, 1, 1, 1)
    edited, unedited = coupled(z, source, noise, time)
    assert torch.allclose(unedited, (1 - time) * source + time * noise)
    assert torch.allclose(edited, z + unedited - source)


@pytest.mark.parametrize("time", [0.0, 0.1, 0.77, 1.0])
def test_where_nothing_is_edited_yet_the_sides_are_one_bit_for_bit(time):
    source, noise = (random(1, 3, 4, 5, seed=seed, dtype=torch.float32) for seed in range(2))
    assert torch.equal(*coupled(source.clone(), source, noise, torch.tensor(time)))


def test_the_denoised_latent_takes_the_papers_step():
    """z - s (mean of the velocities' differences) = x_0 + mean of the denoised latents' differences."""
    z, source = random(1, 3, 4, 5), random(1, 3, 4, 5, seed=1)
    s, later = torch.tensor(0.6, dtype=torch.float64), 0.4

    def velocity(x, side):
        return torch.sin(3 * x + side)

    differences, denoised = [], []
    for seed in range(2, 5):
        edited, unedited = coupled(z, source, random(1, 3, 4, 5, seed=seed), s)
        differences.append(velocity(edited, 1) - velocity(unedited, 0))
        denoised.append((edited - s * velocity(edited, 1)) - (unedited - s * velocity(unedited, 0)))
    expected = z + (later - s) * torch.stack(differences).mean(0)
    told = source + torch.stack(denoised).mean(0)
    assert torch.allclose(z + (later - s) * (z - told) / s, expected)


def test_a_step_has_the_number_of_the_times_above_it():
    times = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    for step, time in enumerate(times.tolist()):
        assert interval(time, times) == step
        assert interval(time * (1 + 1e-6), times) == interval(time * (1 - 1e-6), times) == step
    assert interval(0.65, times) == 2 and interval(1.5, times) == 0


def test_noise_is_a_function_of_its_key_and_of_each_picture():
    both = own_noise((3, 4, 5), [0, 7], 11, 2)
    assert both.shape == (2, 3, 4, 5) and both.dtype == torch.float32
    torch.randn(3)
    assert torch.equal(both[1:], own_noise((3, 4, 5), [7], 11, 2))
    others = [own_noise((3, 4, 5), [0], *key)[0] for key in ((11, 3), (12, 2), (1, 12), (11, 2, 0), (2**64 - 1, 2))]
    everything = [*both, *others]
    assert all(not torch.equal(a, b) for i, a in enumerate(everything) for b in everything[:i])
    many = own_noise((64, 64), range(8), 3)
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02
