"""Blueprints against the nodes' schemas, and at work in core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.clip_vision  # noqa: E402
import comfy.ldm.flux.redux  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from comfy_api.latest import io  # noqa: E402
from semantic_diffusion_adapter.runner.workflow import to_prompt  # noqa: E402

import nodes as stock  # noqa: E402

from .conftest import scramble  # noqa: E402
from .graphs import INSIDE, OUTSIDE, check, object_info, validate  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "subgraphs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture
def info(assets, monkeypatch) -> dict:
    return object_info(monkeypatch)


def read(name: str) -> tuple[dict, dict]:
    """(the one node of the blueprint, the definition of its subgraph)"""
    whole = json.loads((FOLDER / f"{name}.json").read_text(encoding="ascii"))  # core opens it in the system's own encoding
    (node,), (definition,) = whole["nodes"], whole["definitions"]["subgraphs"]
    assert whole["extra"]["BlueprintDescription"] == definition["description"]
    return node, definition


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_is_what_the_page_would_have_published(name, info):
    node, definition = read(name)
    assert node["type"] == definition["id"] and node["title"] == definition["name"] == name
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[key] for key in keys] for link in definition["links"]]
    check(definition["nodes"], links, info)
    for number, port in enumerate(definition["inputs"]):
        assert port["linkIds"] == [link[0] for link in links if link[1:3] == [INSIDE, number]] != []
        assert {link[5] for link in links if link[0] in port["linkIds"]} == {port["type"]}
    for number, port in enumerate(definition["outputs"]):
        assert [(link[0], link[5]) for link in links if link[3:5] == [OUTSIDE, number]] == [(port["linkIds"][0], port["type"])]
    for face, port in [*zip(node["inputs"], definition["inputs"]), *zip(node["outputs"], definition["outputs"])]:
        assert (face["name"], face["type"]) == (port["name"], port["type"])
    assert len(node["inputs"]) == len(definition["inputs"]) and len(node["outputs"]) == len(definition["outputs"])
    # What the node shows at first is what the nodes inside say.
    prompt = to_prompt(unlinked(definition), info)
    inside = {node["id"]: node for node in definition["nodes"]}
    shown = []
    for face, port in zip(node["inputs"], definition["inputs"]):
        _, _, _, target, at, _ = next(link for link in links if link[0] == port["linkIds"][0])
        slot = inside[target]["inputs"][at]
        assert ("widget" in face) == ("widget" in slot)
        if "widget" in face:
            shown.append(prompt[str(target)]["inputs"][slot["name"]])
    assert shown == node["widgets_values"]


def unlinked(definition: dict) -> dict:
    """The definition as a workflow of its own, without what comes from outside or goes there."""
    links = [list(link.values()) for link in definition["links"] if INSIDE != link["origin_id"] and OUTSIDE != link["target_id"]]
    kept = {link[0] for link in links}
    nodes = [
        {**node, "inputs": [{**slot, "link": slot["link"] if slot["link"] in kept else None} for slot in node["inputs"]]}
        for node in definition["nodes"]
    ]
    return {"nodes": nodes, "links": links}


def outputs(definition: dict) -> dict[str, list]:
    """name of an output: where it comes from, in a prompt"""
    ends = {link["id"]: [str(link["origin_id"]), link["origin_slot"]] for link in definition["links"]}
    return {port["name"]: ends[port["linkIds"][0]] for port in definition["outputs"]}


def unpacked(definition: dict, given: dict[str, list], info: dict) -> dict:
    """The nodes inside as a prompt, linked to what is given for the inputs; a widget keeps the value that it has inside."""
    prompt = to_prompt(unlinked(definition), info)
    inside = {node["id"]: node for node in definition["nodes"]}
    used = set()
    for link in definition["links"]:
        if link["origin_id"] == INSIDE:
            slot = inside[link["target_id"]]["inputs"][link["target_slot"]]
            if "widget" not in slot:
                port = definition["inputs"][link["origin_slot"]]["name"]
                prompt[str(link["target_id"])]["inputs"][slot["name"]] = given[port]
                used.add(port)
    assert used == given.keys()
    return prompt


def test_the_edit_can_be_queued_on_the_miniature(info):
    """Unpacked by hand, with the miniature's loaders outside and the pictures shown."""
    _, definition = read("Encode, edit, decode")
    ends = outputs(definition)
    outside = {
        "load": {"class_type": "SDALoadMiniature", "inputs": {}},
        "vision": {
            "class_type": "SDALoadVisionEncoders",
            "inputs": {
                "encoder_1": ["load", 3], "model_1": "from file", "encoder_2": ["load", 4], "model_2": "from file",
                "encoder_3": "none", "model_3": "from file",
            },
        },
        "adapter": {"class_type": "SDALoadAdapter", "inputs": {"adapter": ["load", 5]}},
        "editor": {"class_type": "SDALoadEditDecoder", "inputs": {"edit_decoder": ["load", 6]}},
        "picture": {"class_type": "PreviewImage", "inputs": {"images": ends["image"]}},
        "boxes": {"class_type": "SDAPreviewEmbedding", "inputs": {"embedding": ends["embedding"], "measure": "strength"}},
    }  # fmt: skip
    given = {
        "model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], "image": ["load", 7],
        "vision": ["vision", 0], "adapter": ["adapter", 0], "edit_decoder": ["editor", 0],
    }  # fmt: skip
    validate(unpacked(definition, given, info) | outside)


@pytest.fixture
def toy_loaders(tmp_path, info, monkeypatch):
    """A node ToyRedux: core's SigLIP and style model with random weights, for the width that the miniature's Flux reads.

    Core's own loaders know the published widths alone.
    """
    config = json.loads((Path(comfy.clip_vision.__file__).parent / "clip_vision_siglip_384.json").read_text())
    toy = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 60}
    (tmp_path / "config.json").write_text(json.dumps(config | toy))

    class ToyRedux(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="ToyRedux", category="test", inputs=[], outputs=[io.StyleModel.Output(), io.ClipVision.Output()])

        @classmethod
        def execute(cls) -> io.NodeOutput:
            tower = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
            scramble(tower.model, 0)
            return io.NodeOutput(comfy.sd.StyleModel(scramble(comfy.ldm.flux.redux.ReduxImageEncoder(16, 24), 1)), tower)

    monkeypatch.setitem(stock.NODE_CLASS_MAPPINGS, "ToyRedux", ToyRedux)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return info


def around(ends: dict[str, list]) -> dict:
    """Loaders and sampler outside of a blueprint, with the miniature in FLUX.1's place."""
    return {
        "load": {"class_type": "SDALoadMiniature", "inputs": {}},
        "redux": {"class_type": "ToyRedux", "inputs": {}},
        "prompt": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": "a red circle"}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ends["model"], "positive": ends["positive"], "negative": ["prompt", 0], "latent_image": ["latent", 0],
                "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["load", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Regional prompts", "Picture regions"])
def test_regions_paint_in_core(name, toy_loaders, queue, tmp_path):
    _, definition = read(name)
    ends = outputs(definition)
    given = {"model": ["load", 0], "clip": ["load", 1], "text": ["prompt", 0]}
    if name == "Picture regions":
        given |= {"image_1": ["load", 7], "image_2": ["other", 0], "style_model": ["redux", 0], "clip_vision": ["redux", 1]}
    beside = {
        "masks": {"class_type": "MaskPreview", "inputs": {"mask": ends["masks"]}},
        "other": {"class_type": "ImageInvert", "inputs": {"image": ["load", 7]}},
    }
    prompt = unpacked(definition, given, toy_loaders) | around(ends) | beside
    ran, errors = queue(prompt)
    assert not errors and ran == set(prompt) - (set() if name == "Picture regions" else {"redux", "other"})
    assert len(list(tmp_path.glob("*.png"))) >= 3  # two regions, one picture


def test_redux_with_layout_paints_in_core(toy_loaders, queue, tmp_path):
    """Unpacked by hand; with a prompt beside the picture and without, and by its dials."""
    _, definition = read("Redux with layout")
    assert len(definition["nodes"]) <= 4
    ends = outputs(definition)
    boxes = {"class_type": "SDAPreviewEmbedding", "inputs": {"embedding": ends["embedding"], "measure": "strength"}}
    given = {
        "model": ["load", 0], "image": ["load", 7], "style_model": ["redux", 0], "clip_vision": ["redux", 1], "text": ["prompt", 0],
    }  # fmt: skip
    prompt = unpacked(definition, given, toy_loaders) | around(ends) | {"boxes": boxes}
    ran, errors = queue(prompt)
    assert not errors and ran == set(prompt)
    (encode,) = (key for key, node in prompt.items() if node["class_type"] == "SDAEncodeRedux")
    (positive,) = (key for key, node in prompt.items() if node["class_type"] == "SDAEmbeddingToConditioning")
    prompt[encode]["inputs"]["whole"] = 0.5
    del prompt[positive]["inputs"]["text"]
    ran, errors = queue(prompt)
    assert not errors and ran >= {encode, positive, "sample", "show"} and not ran & {"load", "redux", "prompt"}
    assert len(list(tmp_path.glob("*.png"))) >= 4
