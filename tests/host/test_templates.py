"""Every template of the miniature, queued over the API of a real ComfyUI with the shipped weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.workflow import pictures, to_prompt
from semantic_diffusion_adapter.training.miniature.parser import parse

pytestmark = pytest.mark.host

SCENE = Path(__file__).resolve().parents[2] / "assets" / "miniature" / "scene.png"
TEMPLATES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
    if "miniature" in path.stem.lower()
}
TURNS = "15 Five edits in a row (miniature)"


@pytest.fixture
def prompt(request, nodes: dict, miniature: Path) -> dict:
    """The template of this name as an API prompt, new for every test."""
    return to_prompt(TEMPLATES[request.param], nodes)


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("prompt", [name], indirect=True)


def of_class(prompt: dict, kind: str) -> list[str]:
    return [key for key, node in prompt.items() if node["class_type"] == kind]


def pixels(client: Client, output: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(client.image(output))).convert("RGB"))


def run(client: Client, prompt: dict) -> dict[str, np.ndarray]:
    """Every saved picture as uint8 [H, W, 3], by name."""
    return {name: pixels(client, output) for name, output in pictures(prompt, client.run(prompt)).items()}


def all_of(client: Client, nodes: dict, prompt: dict) -> dict[str, np.ndarray]:
    """Every saved picture but the curves, where all that a template shows came, and no two of them alike."""
    outputs = client.run(prompt)
    assert outputs.keys() >= {key for key, node in prompt.items() if nodes[node["class_type"]]["output_node"]}
    images = {name: pixels(client, output) for name, output in pictures(prompt, outputs).items()}
    curves = [images.pop(name) for name in [*images] if name.endswith("_loss")]
    assert all(curve.std() > 1 for curve in curves)
    assert {name: image.shape for name, image in images.items()} == dict.fromkeys(images, (128, 128, 3))
    assert len({image.tobytes() for image in images.values()}) == len(images) > 1, "no two of its pictures are the same"
    return images


@pytest.mark.parametrize("prompt", [name for name in TEMPLATES if name != TURNS], indirect=True)
def test_a_template_shows_everything_that_it_promises(client: Client, nodes: dict, prompt: dict) -> None:
    for fit in of_class(prompt, "SDAFitEmbedding"):  # which has its own test
        prompt[fit]["inputs"]["steps"] = 2
    all_of(client, nodes, prompt)


@of("07 Blend two images (miniature)")
def test_the_blend_ends_in_either_picture(client: Client, prompt: dict) -> None:
    (blend,), (paint,) = of_class(prompt, "SDABlendEmbeddings"), of_class(prompt, "SDAEmbeddingToConditioning")
    for amount, end in ((0.0, "embedding_a"), (1.0, "embedding_b")):
        prompt[blend]["inputs"]["amount"] = amount
        prompt[paint]["inputs"]["embedding"] = [blend, 0]
        blended = run(client, prompt)["blend"]
        prompt[paint]["inputs"]["embedding"] = prompt[blend]["inputs"][end]
        assert np.abs(blended.astype(int) - run(client, prompt)["blend"]).max() <= 2


@of("05 Edit strength (miniature)")
def test_strength_zero_is_what_the_plain_sampler_paints(client: Client, nodes: dict, prompt: dict) -> None:
    plain = to_prompt(TEMPLATES["01 Reconstruct and edit (miniature)"], nodes)
    painted, truth = run(client, prompt)["strength_0"], run(client, plain)["reconstruction"]
    assert np.abs(painted.astype(int) - truth).max() <= 2


@of("14 Edit and keep the rest (miniature)")
@pytest.mark.parametrize("instruction", ["make the red circle yellow", "remove the red circle", "make the cyan cross green"])
def test_the_flow_edit_edits_inside_the_mask_and_keeps_the_rest(client: Client, prompt: dict, instruction: str) -> None:
    (edit,), (shown,) = of_class(prompt, "SDAEditEmbedding"), of_class(prompt, "MaskPreview")
    prompt[edit]["inputs"]["instruction"] = instruction
    outputs = client.run(prompt)
    images = {name: pixels(client, output).astype(int) for name, output in pictures(prompt, outputs).items()}
    mask = pixels(client, outputs[shown]["images"][0])[..., 0] > 0
    assert 0.02 < mask.mean() < 0.8, "the patches of the miniature are large, and so is what one is grown by"
    plain, flow = (np.abs(images[f"keep_{name}"] - images["keep_source"]).max(-1) for name in ("plain", "flow"))
    assert flow[~mask].mean() < 0.8 * plain[~mask].mean(), "outside is the source, but for the autoencoder"
    assert (flow[mask] > 40).sum() > 0.5 * (plain[mask] > 40).sum() > 20, "inside is the edit"


@of(TURNS)
def test_five_turns_leave_the_sources_own_pixels_where_none_reaches(client: Client, nodes: dict, prompt: dict) -> None:
    images = all_of(client, nodes, prompt)
    source = np.asarray(Image.open(SCENE).convert("RGB")).astype(int)
    turns = [source, *(images[f"turns_{number}"].astype(int) for number in range(1, 6))]
    shown = [sorted(thing.name for thing in parse(turn.astype(np.uint8)).things) for turn in turns[1:]]
    assert shown == [
        ["green cross", "red circle", "red cross"], ["green cross", "red circle"], ["green cross", "yellow circle"],
        ["blue cross", "yellow circle"], ["blue cross", "purple circle"],
    ], "and does what it says"  # fmt: skip
    for before, after in zip(turns, turns[1:]):
        apart = np.abs(after - before).max(-1)
        assert (apart > 40).sum() > 20, "every turn edits"
        assert (apart == 0).mean() > 0.4, "and takes over only what its mask finds"
    assert (turns[-1] == turns[0]).all(-1).mean() > 0.15


@of("09 Save and reuse an embedding (miniature)")
def test_what_was_saved_paints_the_same_picture(client: Client, prompt: dict) -> None:
    """As the note in the template says: pick the file, connect it, and only Load Miniature is still needed."""
    (save,), (load,) = of_class(prompt, "SDASaveEmbedding"), of_class(prompt, "SDALoadEmbedding")
    (paint,) = of_class(prompt, "SDAEmbeddingToConditioning")
    outputs = client.run(prompt)
    before = pixels(client, pictures(prompt, outputs)["reuse"])
    (text,) = outputs[save]["text"]
    prompt[load]["inputs"]["file"] = text.rsplit(" (", 1)[0] + " [output]"
    prompt[paint]["inputs"]["embedding"] = [load, 0]
    rest = ("SDASaveEmbedding", "SDABuildEmbedding", "SDAEncodeImage", "SDALoadVisionEncoders", "SDALoadAdapter")
    prompt = {key: node for key, node in prompt.items() if node["class_type"] not in rest}
    # The file holds half precision: the same picture, not always the same bits.
    assert np.abs(before.astype(int) - run(client, prompt)["reuse"]).mean() < 1


@of("02 Tour, see an embedding (miniature)")
def test_the_tour_shows_who_sees_a_cells_token(client: Client, prompt: dict) -> None:
    """Token 40 of level 2 is the first of the cell in the third row and column of 4 x 4."""
    (shown,) = of_class(prompt, "MaskPreview")
    (output,) = client.run(prompt)[shown]["images"]
    expected = np.zeros((128, 128, 3), dtype=np.uint8)
    expected[64:96, 64:96] = 255
    assert np.array_equal(pixels(client, output), expected)
