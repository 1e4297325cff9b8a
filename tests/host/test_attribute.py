"""Attribute Edit over the API of a real ComfyUI, in a template's graph on the shipped miniature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.workflow import to_prompt

from .painting import find, painted, upstream

pytestmark = pytest.mark.host

FIRST = Path(__file__).resolve().parents[2] / "example_workflows" / "01 Reconstruct and edit (miniature).json"


@pytest.fixture
def plain(nodes: dict, miniature: Path) -> dict:
    """What the first template paints of the bundled scene."""
    prompt = to_prompt(json.loads(FIRST.read_text(encoding="utf-8")), nodes)
    (save,) = (key for key, node in prompt.items() if node["inputs"].get("filename_prefix", "").endswith("reconstruction"))
    return {key: prompt[key] for key in upstream(prompt, save)}


def with_attribute(prompt: dict, **inputs: object) -> dict:
    sampler, loader = find(prompt, "KSampler"), find(prompt, "SDALoadMiniature")
    own = {"model": prompt[sampler]["inputs"]["model"], "clip": [loader, 1], "attribute": "purple", "strength": 1.0, "scale": "auto",
           "coarse": 0.0, "mask_threshold": 0.0, "start_percent": 0.0, "end_percent": 1.0, "blocks": "all"}  # fmt: skip
    edit = {"class_type": "SDAAttributeEdit", "inputs": {**own, **inputs}}
    return {**prompt, "edit": edit, sampler: {**prompt[sampler], "inputs": {**prompt[sampler]["inputs"], "model": ["edit", 0]}}}


def purple(picture: np.ndarray) -> int:
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int(((blue - green > 60) & (red - green > 60)).sum())


def test_things_turn_purple_and_at_strength_0_nothing_does(client: Client, plain: dict) -> None:
    before = painted(client, plain)
    assert np.array_equal(painted(client, with_attribute(plain, strength=0.0)), before)
    counts = [purple(painted(client, with_attribute(plain, strength=strength))) for strength in (0.25, 1.0)]
    assert purple(before) <= counts[0] < counts[1] and counts[1] > 300
    assert np.array_equal(painted(client, plain), before), "nothing of it stays in the model"


def test_the_mask_is_shown(client: Client, plain: dict) -> None:
    sampler, loader = find(plain, "KSampler"), find(plain, "SDALoadMiniature")
    prompt = with_attribute(plain, mask_threshold=0.5)
    (save,) = (key for key, node in plain.items() if node["class_type"] == "SaveImage")
    more = {
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": [loader, 7], "vae": [loader, 2]}},
        "where": {"class_type": "SDAAttributeMask", "inputs": {
            "model": ["edit", 0], "positive": plain[sampler]["inputs"]["positive"], "latent": ["encode", 0], "noises": 2, "seed": 0}},
        "seen": {"class_type": "MaskToImage", "inputs": {"mask": ["where", 0]}},
        save: {**plain[save], "inputs": {**plain[save]["inputs"], "images": ["seen", 0]}},
    }  # fmt: skip
    mask = painted(client, {**prompt, **more})
    assert mask.shape == (128, 128, 3) and mask.min() < 100 < mask.max()


@pytest.mark.parametrize(
    "inputs, words", [({"attribute": " "}, "The attribute is empty"), ({"start_percent": 0.6, "end_percent": 0.5}, "swap them")]
)
def test_what_is_wrong_is_one_sentence(client: Client, plain: dict, inputs: dict, words: str) -> None:
    with pytest.raises(Exception, match=words):
        painted(client, with_attribute(plain, **inputs))
