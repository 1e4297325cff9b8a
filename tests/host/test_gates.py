"""The gates over the API of a real ComfyUI, in a template's graph on the shipped miniature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.workflow import to_prompt

from .painting import find, painted, upstream

pytestmark = pytest.mark.host

KEEP = Path(__file__).resolve().parents[2] / "example_workflows" / "14 Edit and keep the rest (miniature).json"


@pytest.fixture
def plain(nodes: dict, miniature: Path) -> dict:
    """What the template paints anew from the edited embedding, with the template's Change Mask beside it."""
    prompt = to_prompt(json.loads(KEEP.read_text(encoding="utf-8")), nodes)
    (save,) = (key for key, node in prompt.items() if node["inputs"].get("filename_prefix", "").endswith("keep_plain"))
    kept = upstream(prompt, save) | upstream(prompt, find(prompt, "SDAChangeMask"))
    return {key: prompt[key] for key in kept}


def gated(prompt: dict, kind: str, **inputs: object) -> dict:
    """The plain sampler's guider behind a gate of this class."""
    guider, changed = find(prompt, "BasicGuider"), find(prompt, "SDAChangeMask")
    own = {"model": prompt[guider]["inputs"]["model"], "mask": [changed, 0], "strength": 1.0, "lo": 0.9, "hi": 1.0,
           "text_gate": 0.0, "start_percent": 0.0, "end_percent": 1.0, "blocks": "all"}  # fmt: skip
    if kind == "SDASourceGate":
        own |= {"share": "keys and values", **{name: prompt[changed]["inputs"][name] for name in ("source", "latent")}}
    guided = {**prompt[guider], "inputs": {**prompt[guider]["inputs"], "model": ["gate", 0]}}
    return {**prompt, "gate": {"class_type": kind, "inputs": {**own, **inputs}}, guider: guided}


def test_a_source_gate_reads_and_shut_it_is_not_there(client: Client, plain: dict) -> None:
    before = painted(client, plain).astype(int)
    shut = painted(client, gated(plain, "SDASourceGate", strength=0.0))
    assert np.array_equal(shut, before)
    opened = painted(client, gated(plain, "SDASourceGate")).astype(int)
    again = painted(client, gated(plain, "SDASourceGate"))
    assert np.array_equal(opened, again) and np.abs(opened - before).max() > 10
    assert np.array_equal(painted(client, plain), before), "nothing of it stays in the model"


def test_a_reference_gate_leaves_a_picture_without_references_alone(client: Client, plain: dict) -> None:
    before = painted(client, plain)
    assert np.array_equal(painted(client, gated(plain, "SDAReferenceGate", strength=0.0)), before)


@pytest.mark.parametrize(
    "inputs, words", [({"lo": 0.6, "hi": 0.5}, "A gate opens from lo to hi"), ({"blocks": "tail"}, "are not understood")]
)
def test_what_is_wrong_is_one_sentence(client: Client, plain: dict, inputs: dict, words: str) -> None:
    with pytest.raises(Exception, match=words):
        painted(client, gated(plain, "SDASourceGate", **inputs))
