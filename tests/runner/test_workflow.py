from __future__ import annotations

import pytest
from semantic_diffusion_adapter.runner.environment import Failure
from semantic_diffusion_adapter.runner.workflow import fill, pictures, to_prompt

NODES = {
    "LoadImage": {"input": {"required": {"image": [["a.png"], {"image_upload": True}]}}},
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {}],
                "name": ["COMBO", {"options": ["euler"]}],
            },
            "optional": {"positive": ["CONDITIONING"], "given": ["INT", {"forceInput": True}], "cfg": ["FLOAT", {}]},
        }
    },
    "SaveImage": {"input": {"required": {"images": ["IMAGE", {}], "filename_prefix": ["STRING", {}]}}},
}


def graph() -> dict:
    return {
        "nodes": [
            {"id": 1, "type": "LoadImage", "inputs": [], "widgets_values": ["a.png", "image"]},
            {
                "id": 7,
                "type": "Sampler",
                "inputs": [{"name": "model", "link": 3}, {"name": "steps", "link": 4, "widget": {"name": "steps"}}],
                "widgets_values": [42, "fixed", 20, "euler", 1.5],
            },
            {"id": 8, "type": "SaveImage", "inputs": [{"name": "images", "link": 3}], "widgets_values": ["x/edited"]},
            {"id": 9, "type": "MarkdownNote", "widgets_values": ["Read me"]},
        ],
        "links": [[3, 1, 0, 7, 0, "MODEL"], [4, 1, 1, 7, 1, "INT"]],
    }


def test_widgets_links_and_the_value_after_a_seed() -> None:
    assert to_prompt(graph(), NODES) == {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "7": {
            "class_type": "Sampler",
            "inputs": {"model": ["1", 0], "seed": 42, "steps": ["1", 1], "name": "euler", "cfg": 1.5},
        },
        "8": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x/edited"}},
    }


@pytest.mark.parametrize("change", [{"mode": 2}, {"type": "Reroute"}])
def test_what_it_cannot_convert_is_refused(change: dict) -> None:
    workflow = graph()
    workflow["nodes"][1].update(change)
    with pytest.raises(Failure, match="Node 7"):
        to_prompt(workflow, NODES)


def test_what_follows_a_bypassed_node_gets_what_it_was_given() -> None:
    workflow = graph()
    for number, (before, after) in enumerate(((1, 20), (20, 21), (21, 7))):
        workflow["links"].append([10 + number, before, 0, after, 0, "MODEL"])
    for node, link in ((20, 10), (21, 11)):
        inputs = [{"name": "clip", "type": "CLIP", "link": None}, {"name": "model", "type": "MODEL", "link": link}]
        made = {"id": node, "type": "Unknown", "mode": 4, "inputs": inputs, "outputs": [{"name": "MODEL", "type": "MODEL"}]}
        workflow["nodes"].append(made)
    workflow["nodes"][1]["inputs"][0]["link"] = 12
    assert to_prompt(workflow, NODES) == to_prompt(graph(), NODES)


def test_a_bypassed_node_that_has_nothing_to_pass_on_is_named() -> None:
    workflow = graph()
    made = {"id": 20, "type": "Unknown", "mode": 4, "inputs": [], "outputs": [{"name": "MODEL", "type": "MODEL"}]}
    workflow["nodes"].append(made)
    workflow["links"].append([10, 20, 0, 7, 0, "MODEL"])
    with pytest.raises(Failure, match="Node 20 is bypassed and has no MODEL"):
        to_prompt(workflow, NODES)


def test_a_widget_that_the_template_lacks_is_named() -> None:
    workflow = graph()
    workflow["nodes"][1]["widgets_values"].pop()
    with pytest.raises(Failure, match="Sampler has a widget cfg"):
        to_prompt(workflow, NODES)


def test_fill_connects_the_picture_and_sets_instruction_and_seeds() -> None:
    prompt = {
        "2": {"class_type": "SDALoadMiniature", "inputs": {}},
        "3": {"class_type": "ImageScale", "inputs": {"image": ["2", 7], "width": 128}},
        "4": {"class_type": "SDAEditEmbedding", "inputs": {"clip": ["2", 1], "instruction": "the template's own"}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "seed": 0}},
        "6": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "seed": ["9", 0]}},
    }
    assert fill(prompt, image="mine.png", instruction=None, seed=5) is prompt
    assert prompt["picture"] == {"class_type": "LoadImage", "inputs": {"image": "mine.png"}}
    assert prompt["3"]["inputs"] == {"image": ["picture", 0], "width": 128}
    assert prompt["4"]["inputs"] == {"clip": ["2", 1], "instruction": "the template's own"}
    assert prompt["5"]["inputs"] == {"model": ["2", 0], "seed": 5}
    assert prompt["6"]["inputs"]["seed"] == ["9", 0]
    assert fill(prompt, "b.png", "remove it", 1)["4"]["inputs"]["instruction"] == "remove it"


def test_pictures_are_named_by_the_last_word_of_their_prefix() -> None:
    found = {"8": {"images": [{"filename": "edited_00001_.png"}]}, "7": {"text": ["no picture"]}}
    assert pictures(to_prompt(graph(), NODES), found) == {"edited": {"filename": "edited_00001_.png"}}
