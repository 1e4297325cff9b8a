"""The evaluation of fitted embeddings, on a miniature of random weights and short fits."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels.fit import FitSettings  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.training.miniature import evaluate  # noqa: E402
from semantic_diffusion_adapter.training.miniature.captions import Edit  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation import blend, inversion, system  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import Scene, Thing, render, scene  # noqa: E402


@pytest.fixture
def short(monkeypatch):
    """Fits of a few steps."""
    monkeypatch.setattr(inversion, "STEPS", (0, 2, 20))
    monkeypatch.setattr(inversion, "GLOBAL_AT", (0, 20))
    monkeypatch.setattr(inversion, "EDITED_AT", dict.fromkeys(inversion.RATES, 20))
    monkeypatch.setattr(inversion, "AVERAGED", 2)
    monkeypatch.setattr(blend, "PAIRS", 1)


@pytest.fixture(scope="module")
def toy(toy_assets):
    counted = []
    return system.Miniature(toy_assets, torch.device("cpu"), counted.append, ("tree128",)), counted


def test_a_fit_comes_closer_and_does_not_depend_on_the_batch(toy, monkeypatch):
    miniature, _ = toy
    assert miniature.editor_from_fits is None, "its file is not there"
    scenes = [scene("test", i) for i in range(3)]
    latents = miniature.latents(np.stack([render(each) for each in scenes]))
    start = inversion.text_space(miniature).start(PRESETS["tree64"], 3)
    made, seconds = inversion.fitted(miniature, latents, start, FitSettings(6, shift=miniature.mu), (0, 6))
    assert seconds > 0 and torch.allclose(made[0].tokens, start.tokens, atol=1e-5)
    assert not torch.allclose(made[6].tokens[0], made[6].tokens[1], atol=1e-3), "every picture has tokens of its own"
    monkeypatch.setattr(inversion, "TOGETHER", 2)
    parts, _ = inversion.fitted(miniature, latents, start, FitSettings(6, shift=miniature.mu), (0, 6))
    far = (parts[6].tokens - made[6].tokens).abs().mean() / (made[6].tokens - start.tokens).abs().mean()
    assert far < 0.05
    assert next(iter(miniature.flux.attn_processors.values())) is miniature.attention, "as it was before"


def test_edits_are_two_of_different_operations_for_every_scene():
    scenes = [scene("test", i) for i in range(6)]
    changes = inversion.two_edits(scenes, "test", 0)
    assert len(changes) == 12 and all(a.source == b.source and a.operation != b.operation
                                      for a, b in zip(changes[:6], changes[6:]))
    assert [change.source for change in changes[:6]] == scenes


def test_a_twin_shares_colour_or_shape_with_the_thing_that_is_named():
    red, same, other = (Thing("circle", "red", "small", 30, 30), Thing("circle", "blue", "large", 90, 90),
                        Thing("cross", "green", "large", 90, 90))
    for things, twin in (((red, same), True), ((red, other), False), ((red,), False)):
        source = Scene("white", things)
        assert inversion.has_twin(Edit("remove", "", source, Scene("white", things[1:]), red, None)) is twin
    assert not inversion.has_twin(Edit("add", "", Scene("white", (red, same)), Scene("white", (red, same)), None, other))


def test_the_whole_of_it_has_the_form_that_the_page_and_its_readers_expect(toy_assets, short, capsys, tmp_path):
    assets = tmp_path / "assets"
    shutil.copytree(toy_assets, assets)
    (assets / "ablations/edit_decoders").mkdir()
    shutil.copy(assets / "edit_decoders/miniature_editor.safetensors",
                assets / "ablations/edit_decoders/miniature_editor_from_fits.safetensors")
    assert evaluate.main(["inversion", "--scenes", "2", "--json", "--assets", str(assets)]) == 0
    printed, said = capsys.readouterr()
    results = json.loads(printed.splitlines()[-1])
    assert set(results) == {"fit", "edited", "decoder_from_fits"}
    assert set(results["decoder_from_fits"]) == {"success", "preservation"}
    assert list(results["fit"]) == ["mean", "statistics", "caption", "adapter"]
    for values in results["fit"].values():
        assert list(values) == ["0", "2", "20"] and all(set(v) == {"f1", "psnr", "seconds"} for v in values.values())
        assert values["0"]["seconds"] == 0 < values["2"]["seconds"]
    assert results["fit"]["statistics"]["20"]["psnr"] > results["fit"]["statistics"]["0"]["psnr"]
    assert all(set(v) == {"success", "preservation", "twins"} for v in results["edited"].values())
    for words in ("| statistics, not held |", "decoder trained on fits alone |",
                  "| adapter, not refined |", "`global64`", "4 edits", "| norm |"):
        assert words in printed, words
    painted = inversion.painted(2, from_fits=True)
    assert f"{painted}/{painted}" in said.replace("\r", "\n"), "the bar ends where it said"
