"""Change Mask through core's sampling, against the difference of velocities written out with the bare network."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_extras import nodes_model_advanced  # noqa: E402
from semantic_diffusion_adapter.kernels.change_map import times  # noqa: E402
from semantic_diffusion_adapter.kernels.noise import own_noise  # noqa: E402
from semantic_diffusion_adapter.nodes import change  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

from .flow_edits import EDITED, SOURCE, latent, plain, watched  # noqa: E402


def masks(model, source=SOURCE, edited=EDITED, start=None, threshold=0.03, grow=0, feather=0.0, noises=2, seed=5):
    start = latent() if start is None else start
    with torch.inference_mode():
        return change.ChangeMask.execute(model, source, edited, start, threshold, grow, feather, noises, seed).result


@pytest.mark.parametrize("size, batch", [((8, 8), 1), ((7, 9), 2)])
def test_it_is_the_difference_of_the_velocities_of_every_patch(toy, size, batch):
    start = latent(size, batch)
    x0, total = toy.model.model.process_latent_in(start["samples"]), 0

    def velocity(x, conditioning, sigma):
        tokens, settings = conditioning[0]
        return toy.network(x, torch.full((batch,), sigma), tokens.expand(batch, -1, -1), settings["pooled_output"].expand(batch, -1))

    with torch.no_grad():
        for step, sigma in enumerate(times(3)):
            x = sigma * own_noise(x0.shape[1:], range(batch), 5, step) + (1 - sigma) * x0
            square = (velocity(x, EDITED, sigma) - velocity(x, SOURCE, sigma)).square().sum(1)
            rows, cols = -(-size[0] // 2), -(-size[1] // 2)
            total = total + torch.stack(
                [square[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((1, 2)) for r in range(rows) for c in range(cols)], 1
            ).reshape(batch, rows, cols)
    expected = total / total.amax((1, 2), keepdim=True)
    mask, raw = masks(toy.model, start=start, noises=3, threshold=0.5)
    assert mask.shape == raw.shape == (batch, 8 * size[0], 8 * size[1])
    assert torch.allclose(raw[:, ::16, ::16], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(mask, (raw > 0.5).float())


def test_both_conditionings_share_a_forward_for_every_noise(toy):
    model, sizes = watched(toy.model)
    masks(model, noises=3)
    assert sizes == [2, 2, 2]


def test_what_is_the_same_changes_nothing(toy):
    mask, raw = masks(toy.model, edited=SOURCE, threshold=0.0, grow=2, feather=2.0)
    assert not mask.any() and not raw.any()


def test_grown_and_feathered(toy):
    hard, grown, soft = (masks(toy.model, threshold=0.9, **case)[0] for case in ({}, {"grow": 1}, {"feather": 1.0}))
    assert (grown >= hard).all() and grown.sum() > hard.sum()
    assert torch.equal(soft[hard > 0], hard[hard > 0]) and ((soft > 0) & (soft < 1)).any()


def test_the_map_is_of_one_picture_alone(toy):
    start = latent(batch=3)
    every = masks(toy.model, start=start)[1]
    picked = {"samples": start["samples"][[2]], "batch_index": [2]}
    assert torch.allclose(masks(toy.model, start=picked)[1], every[[2]], rtol=1e-3, atol=1e-4)


def test_an_embeddings_edit_in_one_cell_shows_there(toy, embedding):
    """Only patches of the cell see its tokens; the others hear of them in later blocks alone."""
    model, before = flux.patch(toy.model), embedding("tree64")
    after = embedding("tree64")
    after.tokens[:, -2:] *= 4
    raw = masks(model, to_conditioning(before), to_conditioning(after), noises=4)[1][0]
    assert raw[48:, 48:].mean() > 3 * raw[:48, :48].mean()


def test_interrupted_and_rerun_it_is_the_same(toy, monkeypatch):
    expected, stop = masks(toy.model)[1], comfy.model_management.InterruptProcessingException

    def interrupt(*args, **kwargs):
        raise stop

    with monkeypatch.context() as broken:
        broken.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupt)
        with pytest.raises(stop):
            masks(toy.model)
    assert torch.equal(masks(toy.model)[1], expected)


def test_conditionings_of_other_lengths(toy):
    assert masks(toy.model, edited=plain(4, length=9))[1].max() == 1


def test_refusals(toy):
    with pytest.raises(ValueError, match="latent is empty: connect VAE Encode"):
        masks(toy.model, start={"samples": torch.zeros(1, 8, 8, 8)})
    (other,) = nodes_model_advanced.ModelSamplingDiscrete().patch(toy.model, "eps", False)
    with pytest.raises(ValueError, match="Change Mask needs a flow model"):
        masks(other)
