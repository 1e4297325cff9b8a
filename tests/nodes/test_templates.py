"""Templates against the nodes' schemas: as the page reads a file, and as core validates it before a run."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import folder_paths  # noqa: E402
from semantic_diffusion_adapter.runner.workflow import to_prompt  # noqa: E402

from .graphs import check, object_info, slots, validate  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "example_workflows").glob("*.json"))}
TITLE = 30  # height of a node's title bar, which lies above its position
SCREEN = (1366, 768)  # the smallest that a template is made for
FIT, PADDING = 0.75, 10  # of the page's fitToBounds and createBounds, by which it opens a template
READABLE = 0.595  # of its full size; below 8/14 the page draws no text

every_template = pytest.mark.parametrize("name", TEMPLATES)
on_the_miniature = pytest.mark.parametrize("name", [name for name in TEMPLATES if "miniature" in name.lower()])


@pytest.fixture
def info(assets, monkeypatch) -> dict:
    return object_info(monkeypatch)


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
        if node["class_type"] == "SDAFitEmbedding":
            continue  # its steps are no sampler's
        settings |= {(key, inputs[key]) for key in ("steps", "cfg", "sampler_name", "scheduler", "denoise") if key in inputs}
    assert sizes <= {(128, 128, 1)}
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
    # Newer pages zoom before they fold a node that is collapsed.
    opened = [frame({**node, "flags": {}}) for node in workflow["nodes"]]
    lows, highs = map(min, zip(*opened)), map(max, zip(*opened))
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
