"""The text of the Regions node: what it may say, and one sentence for everything else."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels import region_list

BOX = [0.25, 0.0, 0.5, 1.0]


def listed(*regions: object, **more: object) -> str:
    return json.dumps({"version": 1, "regions": regions} | more)


def test_what_is_not_said_has_its_default():
    (region,) = region_list.parse(listed({"box": BOX}))
    assert region.box == tuple(BOX) and region.on and region.mode == "replace" and region.speaks == 0
    assert (region.strength, region.balance, region.start, region.end, region.feather) == (1, 0, 0, 1, 0)
    assert region_list.parse("") == region_list.parse(" \n") == region_list.parse(listed()) == ()


@given(st.integers(0, 2**32 - 1), st.floats(-0.2, 1.2))
@settings(deadline=None, max_examples=30)
def test_a_mask_is_what_its_runs_say(seed, share):
    mask = (torch.rand(256, 256, generator=torch.Generator().manual_seed(seed)) < share).float()
    runs = region_list.runs(mask)
    assert sum(runs) == 256 * 256 and all(length > 0 for length in runs[1:])
    (region,) = region_list.parse(listed({"mask": runs}))
    assert torch.equal(region.painted(), mask)


HOSTILE = {
    "no shape": (listed({"name": "sky"}), "region 'sky' has neither a box nor a mask"),
    "no JSON": ("{", "cannot be read, its JSON is broken"),
    "a list": ("[]", "its JSON is no object"),
    "NaN": ('{"regions": [{"box": [0, 0, NaN, 1]}]}', "the number 'NaN'"),
    "deep": ("[" * 10_000, "nested too deeply"),
    "too long": (" " * 2**20 + "{}", "characters and at most"),
    "a million": ('{"regions": [' + "0," * 300_000 + "0]}", "300001 regions and at most 64"),
    "65": (listed(*({"box": BOX} for _ in range(65))), "65 regions and at most 64"),
    "newer": (listed(version=2), "of version 2 and this pack reads 1: update the pack"),
    "no version": (listed(version=True), "says True for 'version'"),
    "a word for a number": (listed({"box": BOX, "strength": "1"}), "says '1' for 'regions.0.strength'"),
    "true for a number": (listed({"box": BOX, "start": True}), "says True for 'regions.0.start'"),
    "a box of three": (listed({"box": [0, 0, 1]}), "regions.0.box"),
    "outside": (listed({"box": [0, 0, 1, 1.5]}), "says 1.5 for 'regions.0.box.3'"),
    "a colour": (listed({"box": BOX, "colour": "red; background: url(x)"}), "regions.0.colour"),
    "a mode": (listed({"box": BOX, "mode": "multiply"}), "says 'multiply' for 'regions.0.mode'"),
    "unknown": (listed({"box": BOX, "blur": 1}), "has the field 'regions.0.blur', which this version"),
    "backwards": (listed({"box": BOX, "start": 0.8, "end": 0.2}), "starts at 0.8, after its end at 0.2: swap them"),
    "short mask": (listed({"mask": [10, 20]}), "covers 30 of 65536 pixels"),
    "long mask": (listed({"mask": [0, 65536, 65536]}), "covers 131072 of 65536 pixels"),
    "negative run": (listed({"mask": [-1, 65537]}), "says -1 for 'regions.0.mask.0'"),
    "many runs": (listed({"mask": [0] * 65538}), "regions.0.mask"),
    "regions in an object": ('{"regions": {"0": 1}}', "says a dict for 'regions'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_anything_else_is_one_sentence(kind):
    text, sentence = HOSTILE[kind]
    with pytest.raises(ValueError) as refused:
        region_list.parse(text)
    said = str(refused.value)
    assert sentence in said and "\n" not in said and len(said) < 300


NAMES = ["name", "colour", "on", "box", "mask", "feather", "speaks", "placed", "prompt", "strength", "balance", "start", "end", "mode", "x"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["#56b4e9", "join", [0, 0, 1, 1]]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8), max_size=4), VALUES)
@settings(deadline=None, max_examples=300)
def test_any_json_is_a_list_of_regions_or_one_sentence(regions, version):
    for text in (json.dumps({"version": 1, "regions": regions}), json.dumps({"version": version, "regions": regions})):
        try:
            found = region_list.parse(text)
        except ValueError as refused:
            assert "\n" not in str(refused) and len(str(refused)) < 300
        else:
            assert all(0 <= region.start <= region.end <= 1 and (region.box or region.mask) for region in found)
