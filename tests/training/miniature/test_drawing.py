"""Scenes drawn in batches are those of the renderer, and their labels those of the scenes."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from semantic_diffusion_adapter.training.miniature.drawing import codes, draw, labels, scene_of
from semantic_diffusion_adapter.training.miniature.scenes import COLOURS, GROUNDS, SHAPES, Scene, coverage, render, scene
from semantic_diffusion_adapter.training.miniature.stored import training_scenes


def counted(truth: Scene) -> np.ndarray:
    """The labels of the 8 x 8 patches, thing by thing from the exact coverages."""
    found = np.zeros((15, 8, 8), np.float32)
    for thing in truth.things:
        share = coverage(thing).reshape(8, 16, 8, 16).mean((1, 3))
        found[tuple(COLOURS).index(thing.colour)] += share
        found[10 + SHAPES.index(thing.shape)] += share
    found[6 + tuple(GROUNDS).index(truth.ground)] = 1 - found[:6].sum(0)
    found[14] = 1 - found[10:14].sum(0)
    return found.reshape(15, 64).T


@pytest.mark.parametrize("split", ["train", "crowd_test"])
def test_a_batch_is_drawn_as_its_scenes_are(split):
    scenes = [scene(split, index) for index in range(24)] + [Scene(ground, ()) for ground in GROUNDS]
    made = codes(scenes)
    drawn = ((draw(**made) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    expected = np.stack([render(each) for each in scenes]).astype(np.float32)
    # The same formula in float32; where a level lies between two, another order of sums may round the other way.
    assert abs(drawn - expected).max() <= 1 and (drawn != expected).mean() < 1e-3
    torch.testing.assert_close(labels(**made), torch.from_numpy(np.stack([counted(each) for each in scenes])),
                               rtol=1e-4, atol=1e-4)


def test_labels_are_shares_of_area():
    truth = scene("train", 5)
    found, = labels(**codes([truth])).numpy()
    assert found.shape == (64, 15) and found.dtype == np.float32
    assert np.allclose(found[:, :10].sum(1), 1, atol=1e-5) and np.allclose(found[:, 10:].sum(1), 1, atol=1e-5)
    assert (found > -1e-6).all()
    for colour in {t.colour for t in truth.things}:
        area = sum(coverage(t).sum() for t in truth.things if t.colour == colour)
        assert found[:, tuple(COLOURS).index(colour)].sum() * 256 == pytest.approx(area, rel=1e-4)


def test_a_crowd_has_four_to_six_small_things():
    counts = {len(scene("crowd_train", index).things) for index in range(60)}
    assert counts <= {3, 4, 5, 6} and {4, 5, 6} <= counts  # a thing that found no room is left out
    assert {thing.size for index in range(20) for thing in scene("crowd_test", index).things} == {"small"}


def test_codes_are_the_scenes():
    scenes = [scene("crowd_train", index) for index in range(20)] + [scene("train", index) for index in range(20)]
    made = codes(scenes)
    assert [scene_of(things, int(ground)) for things, ground in zip(made["things"].numpy(), made["grounds"])] == scenes


def test_training_scenes_are_kept_once(tmp_path):
    made = training_scenes(30, 5, tmp_path, torch.device("cpu"))
    file, = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = training_scenes(30, 5, tmp_path, torch.device("cpu"))
    assert file.stat().st_mtime_ns == before and len(again) == 35
    assert [again[n] for n in (3, 29)] == [scene("train", n) for n in (3, 29)] and made[31] == scene("crowd_train", 1)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged: delete it"):
        training_scenes(30, 5, tmp_path, torch.device("cpu"))
