"""The evaluation of faithful decoding, on a miniature of random weights."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.miniature import evaluate  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation import (  # noqa: E402
    decoder,
    editing,
    fidelity,
    sequence,
    turns,
    ways,
)
from semantic_diffusion_adapter.training.miniature.evaluation.system import Miniature  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import render  # noqa: E402


class Counting(Miniature):
    """Counts the evaluations of Flux for one of three pictures."""

    evaluations = 0

    def velocity(self, x, time, tokens, reference=None):
        self.evaluations += len(x) // 3
        return super().velocity(x, time, tokens, reference)


@pytest.fixture(scope="module")
def miniature(toy_assets):
    system = Counting(toy_assets, torch.device("cpu"), adapters=("tree128",))
    system.precision = "fp32"  # bfloat16 rounds batches of other sizes otherwise, and their sizes follow the number of threads
    return system


@pytest.fixture(scope="module")
def case(miniature):
    """(a decoder of three scenes, the edited embeddings, the noise)."""
    changes = editing.instructions("test", 3, 0)
    sources = np.stack([render(change.source) for change in changes])
    own, noise = miniature.embed(sources, "tree128"), miniature.noise("test", range(3), 0)
    edited = miniature.edit(own, [change.instruction for change in changes], "parallel")
    return decoder.Decoder(miniature, sources, own, noise, 0), edited, noise


def test_plain_is_what_the_editing_part_paints(miniature, case):
    each, edited, noise = case
    apart = ways.anew(each, edited).astype(int) - miniature.paint(edited, "tree128", noise)
    assert abs(apart).max() <= 1


def test_an_edit_to_the_source_itself_changes_nothing(miniature, case):
    each, _, _ = case
    source = miniature.decode(each.latents).astype(int)
    assert abs(ways.flow_edit(each, each.own) - source).max() <= 1
    assert not each.change(each.own).any()


def test_what_is_held_is_the_sources_latent(miniature, case):
    each, edited, _ = case
    source, nowhere = miniature.decode(each.latents), torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    for made in (ways.flow_edit(each, edited, nowhere), ways.anew(each, edited, inside=nowhere)):
        assert np.array_equal(made, source)
    assert not np.array_equal(ways.flow_edit(each, edited), source)


@pytest.mark.parametrize("way", fidelity.WAYS, ids=lambda way: way.name)
def test_a_way_paints_at_its_cost(miniature, case, way):
    each, edited, _ = case
    one = decoder.Decoder(miniature, each.sources, each.own, each.noise, 0, start=0.75)
    before = miniature.evaluations
    change = each.change(edited)
    mapped = miniature.evaluations - before
    assert mapped == decoder.MAPPED
    made = way.paint(one, edited, change)
    assert made.shape == (3, 128, 128, 3) and made.dtype == np.uint8 and made.std() > 0
    spent = miniature.evaluations - before - mapped
    assert way.evaluations(one) in (spent, spent + mapped), "with the change map's or without"


def test_a_composite_is_the_source_where_nothing_changes(case):
    each, edited, _ = case
    change = torch.zeros(3, 8, 8)
    assert np.array_equal(ways.flow_edit_composited(each, edited, change), each.sources)
    change[:, 3, 3] = 1
    apart = (ways.flow_edit_composited(each, edited, change) != each.sources).any(-1)
    far = 2 * ways.EDGE
    apart[:, 32 - far:80 + far, 32 - far:80 + far] = False
    assert not apart.any()


def test_what_no_mask_reaches_in_five_turns_is_the_sources_own_pixels(miniature):
    chains = [turns.chain_of(index, 0) for index in range(2)]
    source, *made = sequence.pictures(miniature, chains, 0, "turns")
    assert len(made) == 5 and made[-1].shape == source.shape
    free = sequence.untouched(chains)
    assert all((later <= now).all() for now, later in zip(free, free[1:])) and free[-1].any()
    own, last = miniature.embed(source, "tree128"), source
    for turn, now in enumerate(made):
        edited = miniature.edit(own, [chain[turn].instruction for chain in chains], "parallel")
        each = decoder.Decoder(miniature, last, own, miniature.noise("test", range(2), 0), turn)
        beyond = each.mask(each.change(edited), grow=1)[..., None].numpy() == 0
        assert np.array_equal(np.where(beyond, now, 0), np.where(beyond, last, 0))
        own, last = miniature.embed(now, "tree128"), now


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    score, truth = rng.integers(0, 6, (4, 8)).astype(float), rng.random((4, 8)) > 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth] for b in score[~truth]]
    assert fidelity.auc(score, truth) == pytest.approx(np.mean(pairs))
    assert fidelity.auc(truth.astype(float), truth) == 1 and fidelity.auc(score, np.zeros_like(truth)) is None


def test_changed_patches_are_those_with_a_changed_pixel():
    sources = np.zeros((2, 128, 128, 3), dtype=np.uint8)
    targets = sources.copy()
    targets[1, 31, 127, 2] = 1
    patches = fidelity.patches_of(fidelity.truly_changed(sources, targets))
    assert patches.shape == (2, 8, 8) and patches.sum() == 1 and patches[1, 1, 7]


def test_figures_of_a_perfect_edit(case):
    changes = editing.instructions("test", 3, 0)
    sources, targets = (np.stack([render(getattr(c, side)) for c in changes]) for side in ("source", "target"))
    found = fidelity.figures(changes, sources, targets, targets)
    assert found["success"] == found["preservation"] == 1
    assert found["psnr_outside"] == found["psnr_target"] == pytest.approx(58.9, abs=0.1)
    assert 0.9 < found["ssim_outside"] <= 1
    assert fidelity.figures(changes, sources, targets, sources)["psnr_outside"] == pytest.approx(58.9, abs=0.1)


def test_the_whole_of_it_has_the_form_that_the_page_and_its_readers_expect(toy_assets, capsys, monkeypatch):
    for module in (decoder, ways):
        monkeypatch.setattr(module, "STEPS", 5)
    assert evaluate.main(["fidelity", "--scenes", "2", "--json", "--assets", str(toy_assets)]) == 0
    printed, said = capsys.readouterr()
    results = json.loads(printed.splitlines()[-1])
    assert set(results) == {"decode", "change_map", "turns"} and len(results["turns"]) == 5
    assert set(results["change_map"]) == {"model", "tokens"}
    assert list(results["decode"]) == [f"{prefix}{name}" for prefix in ("", "oracle_") for name in fidelity.DECODES]
    for values in results["decode"].values():
        assert set(values) == {"success", "preservation", "twins", "psnr_outside", "ssim_outside", "psnr_target",
                               "evaluations"}
    cost = {name: v["evaluations"] for name, v in results["decode"].items()}
    assert (cost["plain"], cost["change_mask"]) == (5, 13) and cost["flow_edit_masked"] == cost["flow_edit"] + 8 <= 18
    assert cost["oracle_sdedit"] == cost["sdedit"] <= 5
    assert "| oracle_flow_edit_masked |" in printed and "| tokens |" in printed and "| repainted |" in printed
    assert f"{fidelity.painted(2)}/{fidelity.painted(2)}" in said.replace("\r", "\n"), "the bar ends where it said"
