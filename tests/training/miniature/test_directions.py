"""The evaluation of attribute edits, on a miniature of random weights."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.miniature import evaluate  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation import attributes, decoder, directions  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation.system import Miniature  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import SHAPES, Scene  # noqa: E402


@pytest.fixture(scope="module")
def trials(toy_assets):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "STEPS", 2)
        system = Miniature(toy_assets, torch.device("cpu"), adapters=("tree128",))
        system.precision = "fp32"  # bfloat16 rounds a longer sequence otherwise, more than a word of little weight tells
        yield directions.Trials(system, "test", 4, 0)


def test_an_attribute_changes_one_thing_in_one_way():
    kinds = set()
    for index in range(60):
        change, word = attributes.attribute_of("test", index, 0)
        kinds.add(change.operation)
        assert word == getattr(change.result, change.operation) != getattr(change.subject, change.operation)
        assert replace(change.result, **{change.operation: getattr(change.subject, change.operation)}) == change.subject
        assert len(change.target.things) == len(change.source.things)
        assert len({thing.name for thing in change.target.things}) == len(change.target.things)
        covered = attributes.region_of(change).repeat(16, 0).repeat(16, 1)
        apart = (directions.render(change.source) != directions.render(change.target)).any(-1)
        assert apart.any() and not apart[~covered].any()
        assert bool(change.instruction) == (change.operation != "size")
    assert kinds == set(attributes.KINDS)


def test_strength_0_paints_what_plain_paints_and_any_other_does_not(trials):
    plain = trials.plain().astype(int)
    for made in (trials.steered(0.0, True, 0.0), trials.steered(0.0, False, 0.5), trials.guided(0.0)):
        assert abs(made - plain).max() <= 1
    for made in (trials.steered(1.0, True, 0.0), trials.appended(8.0), trials.guided(1.0), trials.steered(1.0, True, 0.0, True)):
        assert made.shape == plain.shape and not np.array_equal(made, plain)


def test_an_appended_word_of_no_weight_is_not_there(trials):
    silent, loud = ((trials.appended(weight) / 255 - trials.plain() / 255).var() for weight in (1e-9, 1e6))
    assert silent < loud / 100


def test_the_truth_succeeds_and_the_source_does_not(trials):
    found = directions.figures(trials, [trials.sources, trials.targets])
    assert (found["success"], found["kept"], found["alone"], found["nearer"], found["monotonic"]) == (1, 1, 1, 1, 1)
    assert found["psnr_outside"] > 50 and set(found["kinds"].values()) == {1.0}
    back = directions.figures(trials, [trials.targets, trials.sources])
    assert (back["success"], back["alone"], back["nearer"]) == (0, 0, 0)


def test_a_dial_is_steady_where_no_picture_comes_back():
    start, half, whole = (np.full((2, 128, 128, 3), level, np.uint8) for level in (100, 110, 120))
    assert directions.steady([start, half, whole]) == 1 and directions.steady([start, start, start]) == 1
    back = np.concatenate([start[:1], whole[1:]])
    assert directions.steady([start, half, back]) == 0.5


def test_an_attribute_on_another_place_is_none():
    change, _ = next(each for each in (attributes.attribute_of("test", i, 0) for i in range(60)) if each[1] in SHAPES)
    far = replace(change.result, x=change.result.x + directions.REACH + 1)
    assert not directions.seen(change, Scene("grey", (far,)))
    assert directions.seen(change, Scene("grey", (replace(change.result, colour="blue"),)))
    assert not directions.alone(change, Scene("grey", (replace(change.result, size="?"),)))


def test_a_mask_is_heard_everywhere(trials):
    heard = trials.heard()
    assert heard.shape == (4, 64) and 0 <= heard.min() < heard.max() <= 1


def test_the_whole_of_it_has_the_form_that_the_page_and_its_readers_expect(toy_assets, capsys, monkeypatch):
    for module, name, value in ((decoder, "STEPS", 2), (directions, "DIAL", (0.5, 1.0)), (directions, "RAW", (5.0,))):
        monkeypatch.setattr(module, name, value)
    assert evaluate.main(["directions", "--scenes", "2", "--json", "--assets", str(toy_assets)]) == 0
    printed, said = capsys.readouterr()
    results = json.loads(printed.splitlines()[-1])
    assert set(results) == {"directions", "mask", "cost"} and set(results["directions"]) == set(directions.METHODS)
    for values in results["directions"].values():
        assert set(values) == {"success", "kept", "psnr_outside", "monotonic"}
    assert set(results["mask"]) == {"auc"} and results["cost"]["ratio"] > 0
    assert f"{directions.painted(2)}/{directions.painted(2)}" in said.replace("\r", "\n"), "the bar ends where it said"
    assert "| rf_inversion |" in printed and "Nothing else" in printed
