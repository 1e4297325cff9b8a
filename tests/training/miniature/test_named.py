"""Every instruction that a page or a template offers to a newcomer does on the bundled scene what it says, and every prompt
for a region shows its thing there, whatever the noise."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import region_list  # noqa: E402
from semantic_diffusion_adapter.kernels.embedding import SemanticEmbedding, from_hierarchy  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation.compositions import prompted  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation.editing import same_and_near  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation.system import ASSETS, Miniature  # noqa: E402
from semantic_diffusion_adapter.training.miniature.parser import parse  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import Scene, Thing, place_centre  # noqa: E402
from semantic_diffusion_adapter.training.miniature.score import matches  # noqa: E402
from semantic_diffusion_adapter.training.miniature.text import encode, token_ids  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
SEEDS = 8
# Of a template whose subject is that a mask keeps what such an instruction takes along.
NEEDS_A_MASK = {"replace the red circle with a yellow square"}
# What the later turns of a chain say of scenes that the earlier ones made.
LATER = {"remove the red cross", "make the red circle yellow", "make the green cross blue", "make the yellow circle purple"}


def named() -> set[str]:
    """Instructions in bold or in quotes on the pages, and those in the widgets of templates."""
    verbs = "|".join(("remove", "add", "make", "move", "replace"))
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "web/docs").glob("*.md")))
    templates = [path.read_text(encoding="utf-8") for path in (ROOT / "example_workflows").glob("*(miniature).json")]
    found = re.findall(rf'(?:\*\*|")((?:{verbs}) (?:the|a) [a-z ]+?)(?:\*\*|")', text + "".join(templates))
    found += [node["widgets_values"][0] for each in templates for node in json.loads(each)["nodes"]
              if node["type"] == "SDAEditEmbedding"]
    return set(found) - {"remove the person"} - NEEDS_A_MASK - LATER


def expected(scene: Scene, instruction: str) -> Scene:
    """The scene after an instruction, read word by word."""
    words = instruction.split()
    things = {thing.name: thing for thing in scene.things}
    if words[0] == "add":  # add a SIZE COLOUR SHAPE at the PLACE
        size, colour, shape, place = words[2], words[3], words[4], " ".join(words[7:])
        x, y = place_centre(place, Thing(shape, colour, size, 0, 0).radius)
        return replace(scene, things=(*scene.things, Thing(shape, colour, size, x, y)))
    old = things.pop(" ".join(words[2:4]))
    if words[0] == "make":
        things["new"] = replace(old, colour=words[4])
    elif words[0] == "move":
        x, y = place_centre(" ".join(words[6:]), old.radius)
        things["new"] = replace(old, x=x, y=y)
    elif words[0] == "replace":
        things["new"] = replace(old, colour=words[6], shape=words[7])
    return replace(scene, things=tuple(things.values()))


@pytest.fixture(scope="module")
def system() -> Miniature:
    return Miniature(ASSETS, torch.device("cpu"), adapters=("tree128",))


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.asarray(Image.open(ASSETS / "scene.png").convert("RGB"))


def prompts() -> dict[str, list[region_list.Region]]:
    """The regions with a prompt of every template of the miniature that lays them on the picture's embedding."""
    found = {}
    for path in (ROOT / "example_workflows").glob("*(miniature).json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] == "SDARegionalPrompt":
                prompt, *box, mode = node["widgets_values"]
                found[path.stem] = [region_list.Region(prompt=prompt, box=tuple(box), mode=mode)]
            elif node["type"] == "SDARegions":
                found[path.stem] = list(region_list.parse(node["widgets_values"][0]))
    return found


def test_prompts_for_regions_show_their_things_there_with_every_noise(system: Miniature, picture: np.ndarray) -> None:
    truth, own, noise = parse(picture), system.embed([picture], "tree128"), system.noise("validation", range(SEEDS), 0)
    assert len(prompts()) >= 2
    wrong = []
    for name, regions in prompts().items():
        laid: SemanticEmbedding = own
        for region in regions:
            laid = prompted(system, laid, region)
        for seed, found in enumerate(map(parse, system.paint_regions(laid, [laid.tokens.expand(SEEDS, -1, -1)], [1.0], noise))):
            for region in regions:
                (x0, y0, x1, y1), mask = region.shape()
                words = region.prompt.split()
                inside = [t for t in found.things if t.name == f"{words[2]} {words[3]}" and mask[round(t.y * 2), round(t.x * 2)] > 0]
                if not inside:
                    wrong.append((name, seed, region.prompt, [t.name for t in found.things]))
            if len(matches(truth, found, same_and_near)) != len(truth.things):
                wrong.append((name, seed, "the picture's own things", [t.name for t in found.things]))
    assert not wrong


def test_the_prompt_beside_the_picture_changes_the_ground_alone_with_every_noise(system: Miniature, picture: np.ndarray) -> None:
    template = json.loads((ROOT / "example_workflows/22 A prompt beside the picture (miniature).json").read_text(encoding="utf-8"))
    (prompt,) = (node["widgets_values"][0] for node in template["nodes"] if node.get("title") == "A prompt beside the picture")
    truth, own, noise = parse(picture), system.embed([picture], "tree128"), system.noise("validation", range(SEEDS), 0)
    with torch.no_grad():
        text = encode(system.text, token_ids([prompt], system.device))[0].float().cpu()
    tokens, wrong = torch.cat([own.tokens, text], 1).expand(SEEDS, -1, -1), []
    for seed, found in enumerate(map(parse, system.paint_regions(own, [tokens], [1.0], noise))):
        if found.ground != prompt.split()[2] or len(matches(truth, found, same_and_near)) != len(truth.things):
            wrong.append((seed, found.ground, [thing.name for thing in found.things]))
    assert not wrong


def test_what_is_named_works_with_every_noise(system: Miniature, picture: np.ndarray) -> None:
    instructions = sorted(named())
    assert len(instructions) >= 5
    truth, own = parse(picture), system.embed([picture] * len(instructions), "tree128")
    edited, noise = system.edit(own, instructions, "parallel"), system.noise("validation", range(SEEDS), 0)
    wrong = []
    for row, instruction in enumerate(instructions):
        embedding = from_hierarchy(edited.tokens[row : row + 1].repeat(SEEDS, 1, 1), edited.hierarchy())
        wanted = expected(truth, instruction)
        for seed, found in enumerate(map(parse, system.paint(embedding, "tree128", noise))):
            if len(found.things) != len(wanted.things) or len(matches(wanted, found, same_and_near)) != len(wanted.things):
                wrong.append((instruction, seed, [thing.name for thing in found.things]))
    assert not wrong
