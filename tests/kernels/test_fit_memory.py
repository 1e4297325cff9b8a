"""What a fit needs, against figures written out by hand."""

from __future__ import annotations

from semantic_diffusion_adapter.kernels.fit_memory import FLUX1, FluxSize, fit_memory

FP8 = 11_901_408_320  # FLUX.1-dev, one byte a weight


def test_a_fit_at_512_pixels_on_an_fp8_base_fits_into_16_gigabytes():
    memory = fit_memory(FLUX1, FP8, tokens=1024 + 128, cast=True)
    assert 12e9 < memory.total < 14e9


def test_running_blocks_again_is_what_makes_it_fit():
    again, kept = (fit_memory(FLUX1, FP8, 1024 + 128, cast=True, recompute=r) for r in (True, False))
    assert again.gradients < 1.5e9 and kept.total > 40e9


def test_by_hand():
    memory = fit_memory(FluxSize(hidden=10, double=1, single=2), weights=1000, tokens=5, itemsize=4)
    unit = 5 * 10 * 4
    assert (memory.kept, memory.working) == (4 * unit, 34 * unit)
    assert memory.total == 1000 + 38 * unit
    cast = fit_memory(FluxSize(hidden=10, double=1, single=2), weights=1000, tokens=5, itemsize=4, cast=True)
    assert cast.working - memory.working == 36 * 10 * 10 * 4


def test_pictures_cost_what_their_tokens_cost():
    one, four = (fit_memory(FLUX1, FP8, tokens) for tokens in (1000, 4000))
    assert four.gradients == 4 * one.gradients
