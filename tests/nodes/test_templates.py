"""Templates and blueprint against the nodes' schemas: as the page reads a file, and as core validates it before a run."""

from __future__ import annotations

import asyncio
import copy
import importlib
import itertools
import json
import uuid
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import execution  # noqa: E402
import folder_paths  # noqa: E402
import semantic_diffusion_adapter  # noqa: E402
from semantic_diffusion_adapter.runner.workflow import SEEDS, WIDGETS, to_prompt  # noqa: E402

import nodes as stock  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "example_workflows").glob("*.json"))}
BLUEPRINT = ROOT / "subgraphs" / "Encode, edit, decode.json"
EXTRAS = ("nodes_mask", "nodes_custom_sampler", "nodes_sd3", "nodes_flux")  # of core, which a server loads by itself
INSIDE, OUTSIDE = -10, -20  # the ends of a subgraph's own links
TITLE = 30  # height of a node's title bar, which lies above its position
SCREEN = (1366, 768)  # the smallest that a template is made for
FIT, PADDING = 0.75, 10  # of the page's fitToBounds and createBounds, by which it opens a template
READABLE = 0.595  # of its full size; below 8/14 the page draws no text

every_template = pytest.mark.parametrize("name", TEMPLATES)
on_the_miniature = pytest.mark.parametrize("name", [name for name in TEMPLATES if "miniature" in name.lower()])


@pytest.fixture
def info(assets, monkeypatch) -> dict:
    """/object_info of core's nodes and ours; core validates with the same classes."""
    classes = dict(stock.NODE_CLASS_MAPPINGS)
    for module in [*(importlib.import_module(f"comfy_extras.{name}") for name in EXTRAS), semantic_diffusion_adapter]:
        if hasattr(module, "NODE_CLASS_MAPPINGS"):
            classes |= module.NODE_CLASS_MAPPINGS
        else:
            listed = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
            classes |= {node.GET_SCHEMA().node_id: node for node in listed}
    monkeypatch.setattr(stock, "NODE_CLASS_MAPPINGS", classes)
    return {
        name: node.GET_NODE_INFO_V1()
        if hasattr(node, "GET_NODE_INFO_V1")
        else {
            "input": node.INPUT_TYPES(),
            "output": node.RETURN_TYPES,
            "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
            "output_node": getattr(node, "OUTPUT_NODE", False),
        }
        for name, node in classes.items()
    }


@pytest.fixture
def public_files(assets, monkeypatch, tmp_path):
    """public_files(workflow): empty files where the loaders look for those that the workflow names, and core's example picture."""

    def put(workflow: dict) -> None:
        for model in itertools.chain(*(node["properties"].get("models", []) for node in workflow["nodes"])):
            folder = tmp_path / model["directory"]
            folder.mkdir(exist_ok=True)
            (folder / model["name"]).touch()
            paths, kinds = folder_paths.folder_names_and_paths[model["directory"]]
            folder_paths.folder_names_and_paths[model["directory"]] = ([str(folder), *paths], kinds)
        (tmp_path / "example.png").touch()
        monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
        folder_paths.filename_list_cache.clear()

    return put


def type_of(kind) -> str:
    return "COMBO" if isinstance(kind, list) else kind


def slots(schema: dict) -> list[tuple[str, str, bool, bool]]:
    """(name, type, is optional, is a widget) of every input in the page's order: the sockets first, then the widgets."""
    found = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in schema["input"].get(group, {}).items():
            widget = type_of(kind) in WIDGETS and not (rest and rest[0].get("forceInput"))
            found.append((name, type_of(kind), group == "optional", widget))
    return sorted(found, key=lambda slot: slot[3])


def check(nodes: list[dict], links: list[list], info: dict) -> None:
    """Every slot, link and widget value of a graph is what the page would have made of these schemas."""
    by_id = {node["id"]: node for node in nodes}
    assert len(by_id) == len(nodes) and len({link[0] for link in links}) == len(links)
    for link, origin, slot, target, at, kind in links:
        if origin != INSIDE:
            output = by_id[origin]["outputs"][slot]
            assert link in output["links"] and output["type"] == kind
        if target != OUTSIDE:
            assert by_id[target]["inputs"][at]["link"] == link and by_id[target]["inputs"][at]["type"] == kind
    ends = {(link[1], link[2], link[0]) for link in links} | {(link[3], link[4], link[0]) for link in links}
    for node in nodes:
        for number, output in enumerate(node["outputs"]):
            assert {(node["id"], number, link) for link in output["links"] or []} <= ends
        for number, slot in enumerate(node["inputs"]):
            assert slot["link"] is None or (node["id"], number, slot["link"]) in ends
        if node["type"] == "MarkdownNote":
            continue
        schema = info[node["type"]]
        wanted = slots(schema)
        values = len([slot for slot in wanted if slot[3]]) + len([slot for slot in wanted if slot[0] in SEEDS])
        if node["type"] == "LoadImage":  # has the page's own upload button, and names no file: who knows which are there?
            wanted, values = [*wanted, ("upload", "IMAGEUPLOAD", False, True)], 0
        there = [(slot["name"], slot["type"], slot.get("shape") == 7, "widget" in slot) for slot in node["inputs"]]
        assert there == wanted, node["type"]
        assert len(node["widgets_values"]) == values, node["type"]
        outputs = [(output["name"], output["type"]) for output in node["outputs"]]
        known = list(zip(schema["output_name"], map(type_of, schema["output"])))
        if not node["type"].startswith("SDA"):
            known = known[: len(outputs)]  # newer cores give their nodes more of them: the page adds those when it opens the file
        assert outputs == known, node["type"]


def validate(prompt: dict) -> None:
    """Core's own validation, as when the prompt is queued. It may tidy the numbers of `prompt`."""
    valid, error, _, node_errors = asyncio.run(execution.validate_prompt(str(uuid.uuid4()), prompt, None))
    assert valid and not node_errors, (error, node_errors)


def frame(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + (0 if node["flags"].get("collapsed") else height)


@every_template
def test_a_template_is_what_the_page_would_have_saved(name, info):
    workflow = TEMPLATES[name]
    check(workflow["nodes"], workflow["links"], info)
    assert workflow["last_node_id"] == max(node["id"] for node in workflow["nodes"])
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])


@every_template
def test_a_template_can_be_queued(name, info, public_files):
    workflow = copy.deepcopy(TEMPLATES[name])
    public_files(workflow)
    for node in workflow["nodes"]:
        if node["type"] == "LoadImage":
            node["widgets_values"] = ["example.png", "image"]
    validate(to_prompt(workflow, info))
    random = [node for node in workflow["nodes"] if node["type"] in ("KSampler", "RandomNoise")]
    assert random and all(node["widgets_values"][1] == "fixed" for node in random)


@on_the_miniature
def test_the_miniature_paints_in_its_own_size_and_steps(name, info):
    sizes, settings = set(), set()
    for node in to_prompt(TEMPLATES[name], info).values():
        inputs = node["inputs"]
        if node["class_type"] == "EmptyLatentImage":
            sizes.add((inputs["width"], inputs["height"], inputs["batch_size"]))
        settings |= {(key, inputs[key]) for key in ("steps", "cfg", "sampler_name", "scheduler", "denoise") if key in inputs}
    assert sizes == {(128, 128, 1)}
    assert settings == {("steps", 20), ("cfg", 1), ("sampler_name", "euler"), ("scheduler", "simple"), ("denoise", 1)}


@every_template
def test_a_template_is_laid_out_readably(name):
    workflow = TEMPLATES[name]
    notes = {node["id"] for node in workflow["nodes"] if node["type"] == "MarkdownNote"}
    assert notes
    frames = {node["id"]: frame(node) for node in workflow["nodes"]}
    for (one, a), (other, b) in itertools.combinations(frames.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"nodes {one} and {other} overlap"
    groups = [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in workflow["groups"])]
    for node, (left, top, right, bottom) in frames.items():
        inside = [x0 <= left and y0 <= top and right <= x1 and bottom <= y1 for x0, y0, x1, y1 in groups]
        assert sum(inside) == 1 or node in notes, f"node {node} lies in {sum(inside)} groups"
    for link, origin, _, target, *_ in workflow["links"]:
        assert frames[origin][0] <= frames[target][0], f"link {link} runs from right to left"
    lows, highs = map(min, zip(*frames.values())), map(max, zip(*frames.values()))
    left, top, right, bottom = (*list(lows)[:2], *list(highs)[2:])
    extents = (right - left + 2 * PADDING, bottom - top + 2 * PADDING)
    assert min(FIT * pixels / extent for pixels, extent in zip(SCREEN, extents)) >= READABLE


def test_the_first_template_is_an_app_as_well(info):
    """What the page's app mode shows; pages that do not know it keep it."""
    name, *others = TEMPLATES
    assert not any("linearData" in TEMPLATES[other]["extra"] for other in others)
    extra, nodes = TEMPLATES[name]["extra"], {str(node["id"]): node for node in TEMPLATES[name]["nodes"]}
    assert extra["linearMode"] is False, "it opens as the graph"
    for node, widget, *_ in extra["linearData"]["inputs"]:
        assert widget in [slot[0] for slot in slots(info[nodes[node]["type"]]) if slot[3]]
    assert [nodes[node]["title"] for node in extra["linearData"]["outputs"]] == ["Edited", "Reconstruction", "Source"]
    assert all(info[nodes[node]["type"]]["output_node"] for node in extra["linearData"]["outputs"])


def test_no_two_templates_write_the_same_files():
    prefixes = [
        node["widgets_values"][0]
        for workflow in TEMPLATES.values()
        for node in workflow["nodes"]
        if node["type"] in ("SaveImage", "SDASaveEmbedding")
    ]
    assert len(prefixes) == len(set(prefixes))
    assert all(prefix.startswith("semantic_diffusion_adapter/") for prefix in prefixes)


def test_the_saved_embedding_is_the_one_that_is_offered_to_load():
    nodes = TEMPLATES["09 Save and reuse an embedding (miniature)"]["nodes"]
    (prefix, *_), (file,) = (
        next(node["widgets_values"] for node in nodes if node["type"] == kind) for kind in ("SDASaveEmbedding", "SDALoadEmbedding")
    )
    assert file == f"{prefix}_00001_.safetensors [output]"


@pytest.fixture
def blueprint() -> tuple[dict, dict]:
    """(the one node of the blueprint, the definition of its subgraph)"""
    whole = json.loads(BLUEPRINT.read_text(encoding="ascii"))  # core opens it in the system's own encoding
    (node,), (definition,) = whole["nodes"], whole["definitions"]["subgraphs"]
    return node, definition


def test_the_blueprint_is_what_the_page_would_have_published(blueprint, info):
    node, definition = blueprint
    assert node["type"] == definition["id"] and node["title"] == definition["name"] == BLUEPRINT.stem
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


def test_the_blueprint_can_be_queued_on_the_miniature(blueprint, info):
    """Unpacked by hand, with the miniature's loaders outside and the pictures shown."""
    _, definition = blueprint
    ends = {link["type"]: [str(link["origin_id"]), link["origin_slot"]] for link in definition["links"] if link["target_id"] == OUTSIDE}
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
        "picture": {"class_type": "PreviewImage", "inputs": {"images": ends["IMAGE"]}},
        "boxes": {"class_type": "SDAPreviewEmbedding", "inputs": {"embedding": ends["SDA_EMBEDDING"], "measure": "strength"}},
    }  # fmt: skip
    given = {
        "model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], "image": ["load", 7],
        "vision": ["vision", 0], "adapter": ["adapter", 0], "edit_decoder": ["editor", 0],
    }  # fmt: skip
    prompt = to_prompt(unlinked(definition), info)
    inside = {node["id"]: node for node in definition["nodes"]}
    used = set()
    for link in definition["links"]:
        if link["origin_id"] == INSIDE:
            slot = inside[link["target_id"]]["inputs"][link["target_slot"]]
            if "widget" not in slot:  # a widget keeps the value that it has inside
                port = definition["inputs"][link["origin_slot"]]["name"]
                prompt[str(link["target_id"])]["inputs"][slot["name"]] = given[port]
                used.add(port)
    assert used == given.keys()
    validate(prompt | outside)
